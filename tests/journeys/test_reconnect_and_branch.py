"""The loop across sessions and jobs: disconnect, reconnect, save, branch."""

from __future__ import annotations

import pytest
import tinker

from homefire.sdk import FiretitanServiceClient, TrainerJobConfig
from journeys.loop import ADAM, BATCH, Loop, row, start_loop


@pytest.fixture(scope="module", params=["full", "lora"])
def loop(homefire_up, request) -> Loop:
    return start_loop(homefire_up(), lora_rank=8 if request.param == "lora" else 0)


def test_a_new_session_continues_at_the_live_weights_and_step(loop):
    loop.train(3)
    before = loop.logprobs()
    loop.connect()
    assert loop.logprobs() == before
    loop.train()
    assert [event["step"] for event in loop.events("optim_step")] == [1, 2, 3, 4]


def test_gradients_left_between_backward_and_step_are_discarded_and_named(loop):
    """The new session's step must equal a step on its own gradient alone."""
    loop.client.save_state("clean").result()
    loop.client.forward_backward([row(b"a gradient that must vanish")], "cross_entropy").result()
    loop.connect()
    loop.train()
    after = loop.logprobs()
    loop.client.load_state_with_optimizer("clean").result()
    loop.train()
    assert loop.logprobs() == after
    discarded = loop.events("gradients_discarded")
    assert discarded
    assert discarded[-1]["num_backward_calls"] == 1


def test_the_superseded_client_is_told_who_took_over(loop):
    old = loop.client
    loop.connect()
    with pytest.raises(Exception, match="superseded"):
        old.forward_backward(BATCH, "cross_entropy").result()
    loop.train()


def test_loading_a_state_restores_the_weights_bit_for_bit(loop):
    loop.client.save_state("mark").result()
    at_mark = loop.logprobs()
    loop.train(2)
    assert loop.logprobs() != at_mark
    loop.client.load_state_with_optimizer("mark").result()
    assert loop.logprobs() == at_mark


def test_without_its_optimizer_a_loaded_state_steps_differently(loop):
    loop.client.load_state_with_optimizer("mark").result()
    loop.train()
    with_optimizer = loop.logprobs()
    loop.client.load_state("mark").result()
    loop.train()
    assert loop.logprobs() != with_optimizer


def test_a_branch_in_another_job_continues_exactly_there(loop):
    loop.client.load_state_with_optimizer("mark").result()
    branch = loop.jobs.create_and_wait(
        TrainerJobConfig(base_model="tiny", lora_rank=loop.lora_rank), timeout_s=120
    )
    service = FiretitanServiceClient(base_url=branch.base_url, api_key=loop.server.api_key)
    client = service.create_training_client(base_model="tiny", lora_rank=loop.lora_rank)
    path = client.resolve_checkpoint_path("mark", source_job_id=loop.job.job_id)
    assert path == f"cross_job://{loop.job.job_id}/mark"
    client.load_state_with_optimizer(path).result()

    def step_and_score(trainer) -> list[list[float]]:
        trainer.forward_backward(BATCH, "cross_entropy").result()
        trainer.optim_step(ADAM).result()
        result = trainer.forward(BATCH, "cross_entropy").result()
        return [list(out["logprobs"].data) for out in result.loss_fn_outputs]

    assert step_and_score(client) == step_and_score(loop.client)
    loop.jobs.delete(branch.job_id)


def test_a_state_that_does_not_exist_is_refused_with_those_that_do(loop):
    with pytest.raises(Exception, match="mark"):
        loop.client.load_state("no-such-state").result()


def test_a_duplicate_state_name_is_refused_unless_overwritten(loop):
    with pytest.raises(Exception, match="mark"):
        loop.client.save_state("mark").result()
    assert "mark" in loop.client.list_checkpoints()


def test_the_wrong_base_model_is_refused_naming_the_jobs_own(loop):
    endpoint = loop.jobs.reconnect_and_wait(loop.job.job_id)
    service = FiretitanServiceClient(base_url=endpoint.base_url, api_key=loop.server.api_key)
    with pytest.raises(Exception, match="tiny"):
        service.create_training_client(base_model="another-model", lora_rank=loop.lora_rank)


def test_the_wrong_rank_is_refused(loop):
    endpoint = loop.jobs.reconnect_and_wait(loop.job.job_id)
    service = FiretitanServiceClient(base_url=endpoint.base_url, api_key=loop.server.api_key)
    with pytest.raises(Exception, match="rank"):
        service.create_training_client(base_model="tiny", lora_rank=0 if loop.lora_rank else 4)


def test_adam_defaults_are_the_protocols(loop):
    assert tinker.AdamParams().beta2 == 0.95
    loop.client.forward_backward(BATCH, "cross_entropy").result()
    assert loop.client.optim_step(tinker.AdamParams()).result().metrics
