"""Kills with real signals, through the whole stack: an unmodified script must not notice."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from homefire.foundation.process import identify, is_alive
from journeys.loop import ADAM, BATCH, Loop, start_loop

STEPS = 6


def weights_digest(loop: Loop, name: str) -> str:
    """Digest of what the trainer computes with, through an ordinary base snapshot."""
    saved = loop.client.save_weights_for_sampler_ext(name, checkpoint_type="base")
    (manifest,) = [
        m for m in loop.store.list("local", loop.job.job_id) if m.identity == saved.snapshot_name
    ]
    return manifest.digest


@pytest.fixture(scope="module")
def undisturbed(homefire_up) -> str:
    loop = start_loop(homefire_up())
    loop.train(STEPS)
    return weights_digest(loop, "final")


def engine_pid(loop: Loop) -> int:
    return loop.events("engine_started")[-1]["pid"]


def front_pid(loop: Loop) -> int:
    return loop.events("started")[-1]["pid"]


@pytest.mark.parametrize("victim", ["engine", "front", "both"])
def test_a_script_ends_with_the_same_weights_across_a_kill(homefire_up, undisturbed, victim):
    loop = start_loop(homefire_up())
    loop.train(2)
    pending = loop.client.forward_backward(BATCH, "cross_entropy")
    if victim in {"front", "both"}:
        os.kill(front_pid(loop), signal.SIGKILL)
    if victim in {"engine", "both"}:
        os.kill(engine_pid(loop), signal.SIGKILL)
    pending.result()
    loop.client.optim_step(ADAM).result()
    loop.train(STEPS - 3)
    assert weights_digest(loop, "final") == undisturbed
    assert [event["step"] for event in loop.events("optim_step")][-1] == STEPS
    if victim == "both":
        replayed = loop.server.cli("trainer", "replay", loop.job.job_id, "--verify", "--json")
        found = json.loads(replayed.stdout)
        assert (found["start"], found["divergences"], found["differences"]) == (None, [], [])
        assert found["slots"]["policy"] == {"step": STEPS, "digest": undisturbed}


def test_killing_control_touches_no_trainer_and_no_deployment(homefire_up):
    server = homefire_up()
    loop = start_loop(server)
    loop.train()
    before = (engine_pid(loop), front_pid(loop))
    record = json.loads((Path(server.home) / "run" / "control.json").read_text())
    os.kill(record["process"]["pid"], signal.SIGKILL)
    loop.train()
    snapshot = loop.syncer.save_and_hotload("after-control-died")
    assert snapshot
    assert (engine_pid(loop), front_pid(loop)) == before
    assert all(is_alive(identify(pid)) for pid in before)


def test_a_stop_and_a_new_up_in_the_middle_of_a_run_lose_nothing(homefire_up, undisturbed):
    server = homefire_up()
    loop = start_loop(server)
    loop.train(3)
    served = loop.syncer.save_and_hotload("before-the-stop")
    loop.follow(server.restart())
    assert loop.deployments.wait_for_hotload(loop.deployment_id, "tiny", served)
    loop.train(STEPS - 3)
    assert weights_digest(loop, "final") == undisturbed
    assert [event["step"] for event in loop.events("optim_step")] == [1, 2, 3, 4, 5, 6]
