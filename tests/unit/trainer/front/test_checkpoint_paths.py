from __future__ import annotations

import pytest

from homefire.trainer.front.checkpoint_paths import Place, parse_state_path
from homefire.wire.checkpoint_paths import CheckpointPath
from homefire.wire.errors import InvalidArgument, WrongCheckpointKind
from homefire.wire.ids import model_id, session_prefix
from homefire.wire.manifest import CheckpointFamily

MODEL = model_id(session_prefix("job-s-2") + "00ff", 0)
RUN = model_id("ts-0123456789abcdef", 3)


def parse(path: str) -> Place:
    return parse_state_path(path, job="job-1", slot="own")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("step-2", Place("own", "step-2", "job-1")),
        ("cross_job://job-9/step-2", Place("policy", "step-2", "job-9")),
        (f"tinker://{MODEL}/weights/ck1", Place("policy", "ck1", "job-s-2")),
        (f"tinker://{RUN}/weights/ck1", Place(RUN, "ck1", None)),
        (str(CheckpointPath(RUN, CheckpointFamily.STATE, "ck1")), Place(RUN, "ck1", None)),
    ],
)
def test_a_path_names_a_job_and_a_slot_and_a_state(path: str, expected: Place) -> None:
    assert parse(path) == expected


@pytest.mark.parametrize("model", [MODEL, RUN])
def test_a_sampler_snapshots_path_is_refused_as_such(model: str) -> None:
    with pytest.raises(WrongCheckpointKind, match="save_state"):
        parse(str(CheckpointPath(model, CheckpointFamily.SAMPLER, "s1")))


@pytest.mark.parametrize(
    "path",
    [
        "../x",
        "/etc/passwd",
        "cross_job://job-9",
        "cross_job://../x",
        "tinker://a/weights",
        "tinker://../weights/x",
        "gs://b/c",
        "",
    ],
)
def test_what_is_no_name_is_refused(path: str) -> None:
    with pytest.raises(InvalidArgument):
        parse(path)
