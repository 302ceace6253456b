"""The example of the public documentation with the real Fireworks clients: verbatim where a release
still takes it, else with the lines changed that the release itself demands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from contract.cells import versions
from contract.clients import run_client
from contract.environments import ENVIRONMENTS
from homefire.checkpoints import DirectoryStore
from homefire.checkpoints.tiny import ensure_tiny
from homefire.wire.manifest import CheckpointFamily, CheckpointKind
from journeys.hf_cache import cache_repository

QUOTED = Path(__file__).parent / "data/training_and_sampling.md"
HOSTED_MODEL = "accounts/fireworks/models/qwen3-8b"
NO_ACCUMULATION = {"        gradient_accumulation_steps=4,\n": ""}
"""From 1.2.0a70 on the client itself refuses any other value than 1."""
OWN_CORE = {"import tinker\n": "from fireworks.training import sdk as tinker\n"}
"""From 1.2.25 on the client brings its own tinker."""
MIGRATION = {"1.2.20": NO_ACCUMULATION, "1.2.30": NO_ACCUMULATION | OWN_CORE}

pytestmark = [
    pytest.mark.parametrize("version", versions("fireworks-ai"), scope="module"),
    pytest.mark.cell(client="fireworks-ai", method="the documented training and sampling example"),
]


def migrated(version: str) -> str:
    text = QUOTED.read_text()
    for line, replacement in MIGRATION.get(version, {}).items():
        assert text.count(line) == 1, line
        text = text.replace(line, replacement)
    return text


@pytest.fixture(scope="module")
def findings(homefire_up, tmp_path_factory, version) -> dict:
    server = homefire_up(arguments=["--alias", f"{HOSTED_MODEL}=tiny"])
    work = tmp_path_factory.mktemp("work")
    tiny = ensure_tiny(work / "tiny")
    cache_repository(work / "hf" / "hub", "Qwen/Qwen3-8B", tiny, pattern="*.json")
    example = work / "example.md"
    example.write_text(migrated(version))
    found = run_client(
        ENVIRONMENTS["fireworks-ai", version],
        "seed_example.py",
        server,
        example,
        env={"HF_HOME": str(work / "hf")},
        timeout_s=600,
    )
    server.stop()
    return {"home": server.home, **found["example"]}


def test_training_changes_the_weights_in_the_direction_of_the_objective(findings):
    assert findings["trained"] > findings["before"] + 1e-4


def test_the_first_sync_is_a_base_and_the_second_a_delta_of_it(findings):
    store = DirectoryStore(findings["home"] / "store")
    snapshots = store.list("local", findings["job_id"], family=CheckpointFamily.SAMPLER)
    assert [s.kind for s in snapshots] == [CheckpointKind.BASE, CheckpointKind.DELTA]
    assert [s.identity for s in snapshots] == [findings["first"][0], findings["second"][0]]
    assert snapshots[1].parent == snapshots[0].identity
    assert snapshots[1].digest != snapshots[0].digest


def test_the_deployment_answers_with_the_synced_weights(findings):
    for sync in ("first", "second"):
        synced, served = findings[sync]
        assert served == synced == findings[f"{sync}_completion"]


def test_the_example_gets_one_completion_for_each_evaluation(findings):
    for (prompt_len, completion_len, total), *rest in findings["completions"]:
        assert rest == []
        assert completion_len > 0
        assert total == prompt_len + completion_len


def test_the_reconnected_client_continues_at_the_live_step(findings):
    """Two and three steps before, one after; reloading the base would undo the training."""
    steps = [
        json.loads(line)["step"]
        for line in (findings["home"] / "jobs" / findings["job_id"] / "events.jsonl")
        .read_text()
        .splitlines()
        if json.loads(line)["event"] == "optim_step"
    ]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert findings["after_reconnect"] >= findings["trained"] - 1e-3
