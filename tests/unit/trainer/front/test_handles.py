"""Sessions, handles and fencing."""

from __future__ import annotations

import pytest

from homefire.wire.engine import DiscardGradients, ForwardBackward, OpenSlot
from homefire.wire.specs import TrainerMode


async def test_a_new_session_goes_on_at_the_live_weights_optimizer_and_step(start_front) -> None:
    async with start_front() as client:
        first = await client.model()
        await client.train(first, 1, 3)
        digest = await client.digest()
        created = await client.create(await client.session())
        assert created["step"] == 3
        assert await client.digest() == digest
        await client.train(created["model_id"], 1, 1)
        assert (await client.status()).step == 4
        opened = [request for request in client.orders.seen if isinstance(request, OpenSlot)]
        assert len(opened) == 1


async def test_the_same_creation_again_is_the_same_handle(start_front) -> None:
    async with start_front() as client:
        session = await client.session()
        body = {"session_id": session, "model_seq_id": 0, "base_model": "tiny"}
        accepted = [(await client.post("create_model", **body)).json() for _ in range(2)]
        assert accepted[0] == accepted[1]
        other = await client.post("create_model", **body, base_only=True)
        assert (other.status_code, other.json()["error"]["code"]) == (400, "sequence_reused")


async def test_the_old_handle_is_fenced_its_running_request_finishes_and_queued_ones_fail(
    start_front, orders
) -> None:
    orders.holds = ForwardBackward
    async with start_front(orders=orders) as client:
        old = await client.model()
        running = await client.forward_backward(old, 1)
        await orders.reached.wait()
        queued = await client.optim_step(old, 2)
        held = await client.optim_step(old, 4)
        session = await client.session()
        body = {"session_id": session, "model_seq_id": 0, "base_model": "tiny"}
        accepted = (await client.post("create_model", **body)).json()
        orders.released.set()
        assert "error" not in await client.result(running)
        for request_id in (queued, held, await client.optim_step(old, 3)):
            failed = await client.result(request_id)
            assert failed["error_class"] == "superseded"
            assert session in failed["error"]
        created = await client.result(accepted["request_id"])
        assert created["gradients_discarded"]["num_backward_calls"] == 1
        (told,) = client.events("gradients_discarded")
        assert (told["model_id"], told["by"]) == (old, created["model_id"])
        assert [event["model_id"] for event in client.events("superseded")] == [old]


async def test_no_leftover_gradient_reaches_the_new_clients_first_step(start_front) -> None:
    async with start_front() as client:
        old = await client.model()
        await client.result(await client.forward_backward(old, 1))
        new = await client.model()
        await client.forward_backward(new, 1)
        stepped = await client.result(await client.optim_step(new, 2))
        assert stepped["metrics"]["num_backward_calls"] == 1
        assert [r for r in client.orders.seen if isinstance(r, DiscardGradients)]


async def test_a_reference_runs_forward_beside_the_policy_and_fences_nobody(start_front) -> None:
    async with start_front() as client:
        policy = await client.model()
        await client.train(policy, 1, 2)
        session = await client.session()
        metadata = {"homefire.base_only": "true"}
        reference = (await client.create(session, user_metadata=metadata))["model_id"]
        trained = await client.result(await client.forward(policy, 5))
        base = await client.result(await client.forward(reference, 1))
        assert base["metrics"]["loss:sum"] > trained["metrics"]["loss:sum"]
        refused = await client.result(await client.forward_backward(reference, 2))
        assert refused["error_class"] == "failed_precondition"
        assert not client.events("superseded")


@pytest.mark.parametrize(
    "body",
    [{"base_model": "other"}, {"lora_config": {"rank": 8}}, {"optimizer_config": {"type": "x"}}],
)
async def test_a_refused_creation_fails_its_future_and_fences_nobody(start_front, body) -> None:
    async with start_front() as client:
        live = await client.model()
        failed = await client.create(await client.session(), **body)
        assert failed["category"] == "user"
        await client.train(live, 1, 1)
        assert (await client.status()).step == 1


async def test_an_unknown_session_or_model_is_not_found(start_front) -> None:
    async with start_front() as client:
        body = {"session_id": "no", "model_seq_id": 0, "base_model": "tiny"}
        assert (await client.post("create_model", **body)).status_code == 404
        assert (await client.post("optim_step", model_id="no", seq_id=1)).status_code == 404


async def test_an_unloaded_handle_does_nothing_more_and_the_weights_stay(start_front) -> None:
    async with start_front() as client:
        model = await client.model()
        await client.train(model, 1, 1)
        unloaded = await client.post("unload_model", model_id=model)
        done = await client.result(unloaded.json()["request_id"])
        assert done == {"type": "unload_model", "model_id": model}
        refused = await client.result(await client.optim_step(model, 3))
        assert refused["error_class"] == "failed_precondition"
        assert (await client.create(await client.session()))["step"] == 1


async def test_an_adapter_job_trains_an_adapter_and_keeps_its_shape(start_front) -> None:
    async with start_front(mode=TrainerMode.LORA, lora_rank=8) as client:
        session = await client.session()
        config = {"rank": 4, "seed": 7}
        model = (await client.create(session, lora_config=config))["model_id"]
        await client.train(model, 1, 1)
        info = (await client.post("get_info", model_id=model)).json()
        assert (info["is_lora"], info["lora_rank"]) == (True, 4)
        saved = await client.call("save_weights_for_sampler", model, 3, path="a")
        assert saved["kind"] == "lora", saved
        wrong = await client.create(session, 1, lora_config={"rank": 8})
        assert "rank is 8, this job's live adapter has 4" in wrong["error"]
        again = await client.create(session, 2, lora_config={"rank": 4})
        assert again["step"] == 1
