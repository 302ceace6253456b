"""One job on two engine ranks, as a user runs it: train, serve, and go on with one rank."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from homefire.foundation.events import read_events
from homefire.sdk import FiretitanServiceClient, TrainerJobConfig
from journeys.loop import BATCH, Loop, start_loop


@pytest.fixture(scope="module")
def loop(homefire_up) -> Loop:
    return start_loop(homefire_up(), ranks=2)


def test_two_ranks_train_are_served_and_their_state_goes_on_in_a_job_of_one(loop):
    assert loop.jobs.get(loop.job.job_id)["engineRanks"] == 2
    loop.train(2)
    loop.syncer.save_and_hotload("trained")
    tokens = BATCH[0].model_input.to_ints()
    (completion,) = asyncio.run(
        loop.sampler().sample_with_prompt_tokens(tokens, max_tokens=1, echo=True, logprobs=True)
    )
    assert completion.weights.identity.startswith("trained")
    served = completion.inference_logprobs[: len(tokens) - 1]
    assert served == pytest.approx(loop.logprobs()[0][:-1], abs=1e-4)

    loop.client.save_state("mark").result()
    loop.client.load_state_with_optimizer("mark").result()
    branch = loop.jobs.create_and_wait(TrainerJobConfig(base_model="tiny"), timeout_s=120)
    service = FiretitanServiceClient(base_url=branch.base_url, api_key=loop.server.api_key)
    alone = service.create_training_client(base_model="tiny")
    alone.load_state_with_optimizer(f"cross_job://{loop.job.job_id}/mark").result()
    (divided,), (whole,) = loaded(loop, loop.job.job_id), loaded(loop, branch.job_id)
    assert whole["digest"] == divided["digest"]
    assert whole["step"] == divided["step"] == 2
    result = alone.forward(BATCH, "cross_entropy").result()
    scored = [logprob for out in result.loss_fn_outputs for logprob in out["logprobs"].data]
    expected = [logprob for row in loop.logprobs() for logprob in row]
    assert scored == pytest.approx(expected, abs=2e-5)


def loaded(loop: Loop, job_id: str) -> list[dict[str, Any]]:
    log = Path(loop.server.home) / "jobs" / job_id / "events.jsonl"
    return [event for _, event in read_events(log) if event["event"] == "state_loaded"]
