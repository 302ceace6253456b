from __future__ import annotations

import pytest

from homefire.trainer.front.checkpoint_paths import StatePath, parse_state_path, session_prefix
from homefire.wire.errors import InvalidArgument, WrongCheckpointKind
from homefire.wire.ids import model_id

MODEL = model_id(session_prefix("job-s-2") + "00ff", 0)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("step-2", StatePath("job-1", "step-2")),
        ("cross_job://job-9/step-2", StatePath("job-9", "step-2")),
        (f"tinker://{MODEL}/weights/ck1", StatePath("job-s-2", "ck1")),
    ],
)
def test_a_path_names_a_job_and_a_state(path: str, expected: StatePath) -> None:
    assert parse_state_path(path, job="job-1") == expected


def test_a_sampler_snapshots_path_is_refused_as_such() -> None:
    with pytest.raises(WrongCheckpointKind, match="save_state"):
        parse_state_path(f"tinker://{MODEL}/sampler_weights/s1", job="job-1")


@pytest.mark.parametrize(
    "path",
    [
        "../x",
        "/etc/passwd",
        "cross_job://job-9",
        "cross_job://../x",
        "tinker://a/weights",
        "gs://b/c",
        "",
    ],
)
def test_what_is_no_name_is_refused(path: str) -> None:
    with pytest.raises(InvalidArgument):
        parse_state_path(path, job="job-1")
