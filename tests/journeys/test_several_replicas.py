"""One deployment of several replicas: what a sync, a death and a change of number mean to its clients."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from typing import Any

import pytest

from journeys.loop import Loop, start_loop

PROMPTS = [[number, *range(40)] for number in range(24)]


@pytest.fixture(scope="module")
def loop(homefire_up) -> Loop:
    """Two replicas, and one sync behind them."""
    loop = start_loop(homefire_up(engine="fake"), min_replicas=2, max_replicas=3)
    loop.train()
    loop.syncer.save_and_hotload("step_1")
    return loop


def replicas_of(loop: Loop) -> list[dict[str, Any]]:
    status = json.loads(loop.server.cli("status", "--json").stdout)
    (deployment,) = [d for d in status["deployments"] if d["name"].endswith("/serving")]
    return deployment["replicas"]


def identities(loop: Loop) -> list[str]:
    return [replica["identity"] for replica in replicas_of(loop)]


def sampled_identities(loop: Loop, prompts: list[list[int]] = PROMPTS) -> set[str | None]:
    """Of completions that are asked for at once, so that every replica gets some."""
    sampler = loop.sampler()

    async def sample_all() -> list[Any]:
        asked = [sampler.sample_with_prompt_tokens(prompt, max_tokens=4) for prompt in prompts]
        return await asyncio.gather(*asked)

    return {completions[0].weights.identity for completions in asyncio.run(sample_all())}


def test_a_sync_is_over_when_every_replica_serves_the_snapshot(loop):
    loop.train()
    snapshot = loop.syncer.save_and_hotload("step_2")
    assert identities(loop) == [snapshot, snapshot]
    assert sampled_identities(loop) == {snapshot}


def test_while_one_replica_is_dead_the_others_answer_and_it_comes_back_with_the_weights(loop):
    (served,) = set(identities(loop))
    os.kill(replicas_of(loop)[0]["pid"], signal.SIGKILL)
    assert sampled_identities(loop) == {served}
    loop.deployments.wait_for_ready("serving")
    loop.train()
    snapshot = loop.syncer.save_and_hotload("step_3")
    assert identities(loop) == [snapshot, snapshot]
    assert replicas_of(loop)[0]["restarts"] == 1


def test_a_replica_that_is_added_serves_what_the_others_serve(loop):
    (served,) = set(identities(loop))
    said = loop.server.cli("deployment", "scale", "serving", "3").stdout
    assert said == "serving: READY, 3 of 3 replicas ready\n"
    assert identities(loop) == [served] * 3
    assert sampled_identities(loop) == {served}


def test_scaled_to_zero_it_is_woken_by_a_request_with_the_weights_it_had(loop):
    (served,) = set(identities(loop))
    loop.deployments.scale("serving", 0)
    loop.deployments.wait_for_ready("serving")
    assert replicas_of(loop) == []
    assert sampled_identities(loop, PROMPTS[:1]) == {served}
    loop.deployments.wait_for_ready("serving")
    assert identities(loop) == [served, served]
