"""Kills with real signals, through the whole stack: an unmodified script must not notice."""

from __future__ import annotations

import json
import os
import signal

import pytest

from faults.resumable import STEPS, engine_pid, front_pid, undisturbed_digest, weights_digest
from journeys.loop import ADAM, BATCH, start_loop


@pytest.fixture(scope="module")
def undisturbed(homefire_up) -> str:
    return undisturbed_digest(homefire_up())


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
