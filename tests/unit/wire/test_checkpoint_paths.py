from __future__ import annotations

import pytest

from homefire.wire.checkpoint_paths import CheckpointPath, checkpoint_in, parse_checkpoint_path
from homefire.wire.errors import InvalidArgument
from homefire.wire.manifest import CheckpointFamily

RUN = "ts-3f9a1c2e4b50536f:train:0"


@pytest.mark.parametrize(
    ("text", "family"),
    [
        (f"tinker://{RUN}/weights/step-40", CheckpointFamily.STATE),
        (f"tinker://{RUN}/sampler_weights/step-40", CheckpointFamily.SAMPLER),
        (f"tinker://{RUN}/external_weights/step-40", CheckpointFamily.EXTERNAL),
    ],
)
def test_a_path_says_run_family_and_name_and_is_written_again_as_it_was(text, family):
    path = parse_checkpoint_path(text)
    assert path == CheckpointPath(RUN, family, "step-40")
    assert str(path) == text
    assert checkpoint_in(RUN, path.checkpoint_id) == path


@pytest.mark.parametrize(
    "text",
    [
        "",
        "step-40",
        f"{RUN}/weights/step-40",
        f"tinker://{RUN}",
        f"tinker://{RUN}/step-40",
        f"tinker://{RUN}/other/step-40",
        f"tinker://{RUN}/weights/",
        f"tinker://{RUN}/weights/a/b",
        f"tinker://{RUN}/weights/..",
        "tinker://../weights/a",
        "tinker:///weights/a",
        "cross_job://job-1/a",
    ],
)
def test_what_is_no_path_is_refused_by_the_field_it_came_in(text):
    with pytest.raises(InvalidArgument) as caught:
        parse_checkpoint_path(text, field="source_path")
    assert caught.value.field == "source_path"


def test_a_bare_name_says_no_kind():
    with pytest.raises(InvalidArgument, match="step-40") as caught:
        checkpoint_in(RUN, "step-40")
    assert "weights/<name>" in caught.value.hint
