"""Control dies, everything is stopped and started again: training and serving go on where they were."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from faults.resumable import STEPS, engine_pid, front_pid, undisturbed_digest, weights_digest
from homefire.foundation.process import identify, is_alive
from journeys.loop import ADAM, BATCH, start_loop


@pytest.fixture(scope="module")
def undisturbed(homefire_up) -> str:
    return undisturbed_digest(homefire_up())


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


def test_a_paused_job_holds_nothing_and_its_next_operation_goes_on_with_the_same_bits(
    homefire_up, undisturbed
):
    server = homefire_up()
    loop = start_loop(server)
    loop.train(3)
    loop.client.forward_backward(BATCH, "cross_entropy").result()
    processes = [identify(engine_pid(loop)), identify(front_pid(loop))]
    assert "PAUSED" in server.cli("trainer", "pause", loop.job.job_id).stdout
    assert not any(is_alive(process) for process in processes)
    loop.client.optim_step(ADAM).result()
    loop.train(1)
    server.cli("trainer", "pause", loop.job.job_id)
    assert "RUNNING" in server.cli("trainer", "resume", loop.job.job_id).stdout
    loop.train(STEPS - 5)
    assert weights_digest(loop, "final") == undisturbed
