"""The example of the public documentation, verbatim, with the real Fireworks client."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from contract.environments import ENVIRONMENTS
from homefire.checkpoints import DirectoryStore
from homefire.checkpoints.tiny import ensure_tiny
from homefire.wire.manifest import CheckpointFamily, CheckpointKind
from journeys.hf_cache import cache_repository

HERE = Path(__file__).parent
HOSTED_MODEL = "accounts/fireworks/models/qwen3-8b"


@pytest.fixture(scope="module")
def findings(homefire_up, tmp_path_factory) -> dict:
    server = homefire_up(arguments=["--alias", f"{HOSTED_MODEL}=tiny"])
    cache = tmp_path_factory.mktemp("hf")
    tiny = ensure_tiny(cache / "tiny")
    cache_repository(cache / "hub", "Qwen/Qwen3-8B", tiny, pattern="*.json")
    environment = {
        **os.environ,
        "FIREWORKS_BASE_URL": server.url,
        "FIREWORKS_API_KEY": server.api_key,
        "HF_HOME": str(cache),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    run = subprocess.run(
        [
            ENVIRONMENTS["fireworks-ai", "1.2.0a68"].python(),
            HERE / "seed_script.py",
            HERE / "data/training_and_sampling.md",
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-6000:]
    line = next(line for line in run.stdout.splitlines() if line.startswith("FINDINGS "))
    return {"home": server.home, **json.loads(line.removeprefix("FINDINGS "))}


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
