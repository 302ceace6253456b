"""`homefire checkpoint verify|diff|export|promote` on a store that a trainer filled."""

from __future__ import annotations

import numpy as np
import pytest

from homefire.checkpoints import (
    CheckpointFamily,
    CheckpointKey,
    DirectoryStore,
    SnapshotInfo,
    ensure_tiny,
    raw_tensor,
    read_model_directory,
    write_base,
    write_delta,
)

KEY = CheckpointKey("local", "job-1", "policy", CheckpointFamily.SAMPLER, "step_1")


def weights(value: float) -> dict:
    layer = np.zeros((2, 3), np.float32)
    layer[0, 0] = value
    return {"layer": raw_tensor(layer), "head": raw_tensor(np.ones(2, np.float32))}


@pytest.fixture
def store(home):
    """A base `step_1` and its delta `step_2`, one of eight elements further."""
    store = DirectoryStore(home.store)
    tiny = ensure_tiny(home.models)
    info = SnapshotInfo(step=1, base_model="tiny", created_at=1.0)
    base = write_base(store, KEY, weights(1.0), info, model_files=tiny)
    write_delta(
        store,
        KEY.sibling("step_2"),
        weights(1.5),
        SnapshotInfo(step=2, base_model="tiny", created_at=2.0),
        parent=base,
        parent_tensors=weights(1.0),
    )
    return store


def damage(store: DirectoryStore, name: str, file: str) -> None:
    path = store.directory(KEY.sibling(name)) / file
    path.write_bytes(path.read_bytes()[:-1])


def test_every_checkpoint_is_verified_without_a_running_homefire(homefire, store):
    outcome = homefire("checkpoint", "verify", "--job", "accounts/local/rlorTrainerJobs/job-1")
    assert outcome.status == 0
    assert [line.split()[:2] for line in outcome.out.splitlines()] == [
        ["ok", "step_1"],
        ["ok", "step_2"],
        ["2", "of"],
    ]


def test_damage_is_named_and_ends_in_a_failure(homefire, store):
    damage(store, "step_2", "delta.safetensors")
    outcome = homefire("checkpoint", "verify", "--job", "job-1")
    assert outcome.status == 1
    assert "DAMAGED  step_2" in outcome.out
    assert "1 of 2 checkpoints are whole" in outcome.out
    (whole, damaged) = homefire("checkpoint", "verify", "--job", "job-1", "--json").json[
        "checkpoints"
    ]
    assert (whole["ok"], damaged["ok"]) == (True, False)
    assert "delta.safetensors" in damaged["error"]


def test_one_checkpoint_is_verified_by_name(homefire, store):
    damage(store, "step_2", "delta.safetensors")
    assert homefire("checkpoint", "verify", "step_1", "--job", "job-1").status == 0


def test_a_difference_is_shown_tensor_by_tensor(homefire, store):
    outcome = homefire("checkpoint", "diff", "step_1", "step_2", "--job", "job-1")
    assert "layer" in outcome.out
    assert "head" not in outcome.out
    assert "1 of 8 elements differ (12.50%)" in outcome.out
    rows = homefire("checkpoint", "diff", "step_1", "step_2", "--job", "job-1", "--json").json
    assert rows["tensors"][1] == {
        "name": "layer",
        "num_elements": 6,
        "num_changed": 1,
        "largest": 0.5,
    }


def test_a_delta_is_exported_as_a_whole_model(homefire, store, tmp_path):
    to = tmp_path / "made" / "model"
    outcome = homefire("checkpoint", "export", "step_2", "--job", "job-1", "--to", str(to))
    assert outcome.status == 0, outcome.err
    found = read_model_directory(to)
    assert found["layer"].data.tobytes() == weights(1.5)["layer"].data.tobytes()
    assert (to / "config.json").is_file()
    assert (to / "tokenizer.json").is_file()
    again = homefire("checkpoint", "export", "step_2", "--job", "job-1", "--to", str(to))
    assert again.status == 0, "the same weights are there already"


def test_an_export_never_writes_over_something_else(homefire, store, tmp_path):
    to = tmp_path / "notes"
    to.mkdir()
    (to / "thesis.txt").write_text("mine")
    outcome = homefire("checkpoint", "export", "step_1", "--job", "job-1", "--to", str(to))
    assert outcome.status == 1
    assert "exists and does not hold snapshot 'step_1'" in outcome.err
    assert [path.name for path in to.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("verify", "--job", "nope"), "jobs with checkpoints: job-1"),
        (("verify", "step_9", "--job", "job-1"), "its latest are: step_1, step_2"),
        (("diff", "step_1", "step_9", "--job", "job-1"), "no checkpoint 'step_9'"),
        (("verify", "--job", "job-1", "--slot", "other"), "in slot 'other'"),
    ],
)
def test_what_does_not_exist_is_told_with_what_does(homefire, store, words, said):
    outcome = homefire("checkpoint", *words)
    assert outcome.status == 1
    assert said in outcome.err


def test_a_promotion_is_waited_for(homefire, control):
    name = "accounts/local/operations/promote-1"
    path = "/v1/accounts/local/checkpoints/step_2:promote"
    control.answers[f"POST {path}"] = {"operation": {"name": name, "done": False}}
    model = {
        "name": "accounts/local/models/mine",
        "state": "READY",
        "kind": "HF_BASE_MODEL",
        "source": "x",
    }
    control.answers[f"GET /v1/{name}"] = {"name": name, "done": True, "response": model}
    outcome = homefire("checkpoint", "promote", "step_2", "--job", "job-1", "--as", "mine")
    assert outcome.status == 0, outcome.err
    assert outcome.out.splitlines() == ["promoting step_2 …", "accounts/local/models/mine is there"]


def test_a_failed_promotion_says_why(homefire, control):
    path = "/v1/accounts/local/checkpoints/step_2:promote"
    error = {"code": "INTERNAL", "message": "the disk is full"}
    operation = {"name": "accounts/local/operations/promote-1", "done": True, "error": error}
    control.answers[f"POST {path}"] = {"operation": operation}
    outcome = homefire("checkpoint", "promote", "step_2", "--job", "job-1", "--as", "mine")
    assert outcome.status == 1
    assert "the disk is full" in outcome.err
