"""Deaths of the engine and of the front, within one process. tests/faults kills real ones."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from homefire.checkpoints import CheckpointFamily, CheckpointKey
from homefire.foundation.clock import ManualClock
from homefire.trainer.front.journal import segments
from homefire.trainer.front.records import STEP_TIME, PlainResult
from homefire.wire.engine import (
    AdoptSnapshot,
    ExecutionPlan,
    Forward,
    ForwardBackward,
    LoadRecovery,
    OpenModel,
    OptimStep,
    SaveRecovery,
)
from homefire.wire.errors import Unavailable
from homefire.wire.internal import TrainerState
from homefire.wire.specs import ActivationBudget
from unit.trainer.front.conftest import Orders


@pytest.fixture
async def undisturbed(start_front) -> str:
    """Digest after the session below, when nothing dies."""
    async with start_front(job="undisturbed") as client:
        return await session_of_four_steps(client)


async def session_of_four_steps(client) -> str:
    model = await client.model()
    await client.train(model, 1, 2)
    await client.call("save_weights_for_sampler", model, 5, path="a")
    await client.call("save_weights", model, 6, path="s")
    await client.result(await client.forward(model, 7))
    await client.train(model, 8, 1)
    await client.call("load_weights", model, 10, path="s", optimizer=True)
    await client.train(model, 11, 2)
    await client.call("save_weights_for_sampler", model, 15, path="b", checkpoint_type="delta")
    return await client.digest()


@pytest.mark.parametrize("dies_at", [ForwardBackward, OptimStep, Forward, AdoptSnapshot])
async def test_an_engine_that_dies_is_replaced_and_the_weights_are_the_same(
    start_front, orders, undisturbed: str, dies_at
) -> None:
    """AdoptSnapshot only comes in a replay: the second engine dies while it recovers."""
    orders.dies_at = [Forward, AdoptSnapshot] if dies_at is AdoptSnapshot else [dies_at]
    async with start_front(orders=orders) as client:
        assert await session_of_four_steps(client) == undisturbed
        status = await client.status()
        assert status.engine_restarts == (2 if dies_at is AdoptSnapshot else 1)
        assert status.error is None
        assert orders.dies_at == []


async def test_a_front_that_is_killed_goes_on_with_the_same_client(
    start_front, undisturbed: str, datum
) -> None:
    async with start_front(crash=True) as client:
        model = await client.model()
        await client.train(model, 1, 2)
        await client.call("save_weights_for_sampler", model, 5, path="a")
        await client.call("save_weights", model, 6, path="s")
        await client.result(await client.forward(model, 7))
        fetched = await client.forward_backward(model, 8, data=[datum([1, 2, 3])])
        first = await client.result(fetched)
    async with start_front() as client:
        assert await client.result(fetched) == first
        assert await client.forward_backward(model, 8, data=[datum([1, 2, 3])]) == fetched
        await client.result(await client.optim_step(model, 9))
        await client.call("load_weights", model, 10, path="s", optimizer=True)
        await client.train(model, 11, 2)
        await client.call("save_weights_for_sampler", model, 15, path="b", checkpoint_type="delta")
        assert await client.digest() == undisturbed
        assert (await client.status()).error is None


async def test_a_replay_obeys_the_plan_that_was_journaled(start_front, orders, datum) -> None:
    """Whatever a front would plan for the same rows today: the bits depend on it."""

    def plans(seen: list[Any]) -> list[ExecutionPlan]:
        return [request.plan for request in seen if isinstance(request, ForwardBackward)]

    rows = [datum([1, 2, 3]), datum([4, 5, 6, 7]), datum([8, 9])]
    later = Orders()
    tight = ActivationBudget(
        max_bytes=250, layer_token_bytes=50, input_token_bytes=10, num_layers=2
    )
    crashing = start_front(orders=orders, micro_batch_tokens=4, activations=tight, crash=True)
    async with crashing as client:
        model = await client.model()
        await client.forward_backward(model, 1, data=rows)
        await client.result(await client.optim_step(model, 2))
    async with start_front(orders=later, micro_batch_tokens=99, threads=2) as client:
        await client.result(await client.forward_backward(model, 3, data=rows))
    journaled = ExecutionPlan(micro_batches=[[1], [0, 2]], threads=1, recompute=[1, 1])
    todays = ExecutionPlan(micro_batches=[[1, 0, 2]], threads=2)
    assert plans(orders.seen) == [journaled]
    assert plans(later.seen) == [journaled, todays]


def test_a_replayed_step_may_take_longer_and_nothing_else() -> None:
    def stepped(norm: float, seconds: float) -> PlainResult:
        return PlainResult({"metrics": {"grad_norm": norm, STEP_TIME: seconds}, "step": 3})

    assert stepped(1.5, 0.1).is_repeated_by(stepped(1.5, 0.7))
    assert not stepped(1.5, 0.1).is_repeated_by(stepped(1.5000001, 0.1))
    assert not stepped(1.5, 0.1).is_repeated_by(PlainResult({"step": 3}))


async def test_what_failed_and_what_it_cleared_is_the_same_after_a_replay(
    start_front, datum
) -> None:
    async with start_front(crash=True) as client:
        model = await client.model()
        await client.train(model, 1, 1)
        await client.forward_backward(model, 3)
        await client.forward_backward(model, 4, data=[datum([1, 99])])
        failed = await client.result(await client.optim_step(model, 5))
        await client.forward_backward(model, 6)
        await client.result(await client.optim_step(model, 7))
        await client.result(await client.forward_backward(model, 8, data=[datum([1, 99])]))
        digest = await client.digest()
    async with start_front() as client:
        again = await client.result(await client.optim_step(model, 9))
        assert again["error_class"] == failed["error_class"] == "incomplete_gradient"
        assert "seq_id 8" in again["error"]
        assert await client.digest() == digest
        assert (await client.status()).error is None


async def test_a_gap_that_was_given_up_stays_given_up_after_a_restart(start_front) -> None:
    clock = ManualClock()
    async with start_front(clock=clock, gap_timeout_s=10.0, crash=True) as client:
        model = await client.model()
        held = await client.forward_backward(model, 2)
        clock.advance(10)
        await client.front.admission.gaps.expire_due()
        failed = await client.result(held)
    async with start_front(clock=clock) as client:
        assert await client.result(held) == failed
        stepped = await client.result(await client.optim_step(model, 3))
        assert "seq_id 1" in stepped["error"]
        await client.train(model, 4, 1)
        assert (await client.status()).step == 1


async def test_requests_held_behind_a_gap_are_held_after_a_restart_too(start_front) -> None:
    async with start_front(crash=True) as client:
        model = await client.model()
        held = await client.optim_step(model, 2)
    async with start_front() as client:
        assert client.front.futures.is_pending(held)
        await client.forward_backward(model, 1)
        assert (await client.result(held))["step"] == 1


async def test_accepted_requests_run_after_a_restart_in_their_order(start_front, orders) -> None:
    orders.holds = ForwardBackward
    async with start_front(orders=orders, crash=True) as client:
        model = await client.model()
        step = await client.optim_step(model, 3)
        await client.forward_backward(model, 1)
        await orders.reached.wait()
        await client.forward_backward(model, 2)
    async with start_front() as client:
        stepped = await client.result(step)
        assert stepped["metrics"]["num_backward_calls"] == 2
        assert (await client.status()).step == 1


async def test_a_clean_stop_leaves_a_recovery_point_and_nothing_to_replay(start_front) -> None:
    async with start_front() as client:
        model = await client.model()
        await client.train(model, 1, 3)
        await client.result(await client.forward_backward(model, 7))
        digest = await client.digest()
    async with start_front() as client:
        stepped = await client.result(await client.optim_step(model, 8))
        assert stepped["step"] == 4
        assert stepped["metrics"]["num_backward_calls"] == 1, "unapplied gradients are kept too"
        status = await client.status()
        assert (status.replayed, status.num_applied) == (0, 9)
        assert await client.digest() != digest


async def test_points_are_taken_at_the_interval_two_are_kept_and_the_journal_is_trimmed(
    start_front,
) -> None:
    clock = ManualClock()
    async with start_front(clock=clock, recovery_interval_s=60.0) as client:
        model = await client.model()
        for n in range(4):
            clock.advance(1000)
            await client.train(model, 2 * n + 1, 1)
            await client.settled()
        job = Path(client.front.spec.job_dir)
        assert len([r for r in client.orders.seen if isinstance(r, SaveRecovery)]) >= 3
        points = sorted(path.name for path in (job / "recovery").iterdir())
        assert points == [point.name for point in client.front.ledger.points]
        assert len(points) == 2
        clock.advance(24 * 3600)
        await client.train(model, 9, 1)
        digest = await client.digest()
    assert segments(job / "journal")[0] > 1
    async with start_front(clock=clock) as client:
        await client.result(await client.forward(model, 11))
        assert await client.digest() == digest
        assert (await client.status()).num_applied == 12


async def test_a_state_that_was_loaded_and_then_overwritten_is_not_loaded_again(
    start_front,
) -> None:
    async with start_front(crash=True) as client:
        model = await client.model()
        await client.call("save_weights", model, 1, path="s")
        await client.train(model, 2, 1)
        await client.call("load_weights", model, 4, path="s", optimizer=True)
        await client.train(model, 5, 2)
        await client.call("save_weights", model, 9, path="s", overwrite=True)
        await client.train(model, 10, 1)
        digest = await client.digest()
        taken = [r for r in client.orders.seen if isinstance(r, SaveRecovery)]
        assert len(taken) == 1
        await client.call("save_weights", model, 12, path="s", overwrite=True)
        assert [r for r in client.orders.seen if isinstance(r, SaveRecovery)] == taken
    async with start_front() as client:
        await client.result(await client.forward(model, 13))
        assert await client.digest() == digest
        assert (await client.status()).error is None


async def test_a_state_may_be_deleted_once_the_front_has_forgotten_its_loads(start_front) -> None:
    """One recovery point, and only where a replay would load something."""
    async with start_front(crash=True) as client:

        def points() -> int:
            return len([r for r in client.orders.seen if isinstance(r, SaveRecovery)])

        model = await client.model()
        await client.call("save_weights", model, 1, path="s")
        await client.train(model, 2, 1)
        await client.front.worker.forget_loads()
        assert points() == 0
        await client.call("load_weights", model, 4, path="s", optimizer=True)
        await client.train(model, 5, 2)
        await asyncio.gather(*(client.front.worker.forget_loads() for _ in range(3)))
        assert points() == 1
        spec = client.front.spec
        state = ("local", spec.job, "policy", CheckpointFamily.STATE, "s")
        client.front.store.delete(CheckpointKey(*state))
        await client.train(model, 9, 1)
        digest = await client.digest()
    async with start_front() as client:
        await client.result(await client.forward(model, 11))
        assert await client.digest() == digest
        assert (await client.status()).error is None


async def test_loads_are_not_forgotten_while_the_engine_is_down(start_front) -> None:
    async with start_front() as client:
        model = await client.model()
        await client.call("save_weights", model, 1, path="s")
        await client.call("load_weights", model, 2, path="s", optimizer=True)
        await client.front.worker.stop()
        client.front.ledger._loaded_at = client.front.ledger.position + 1
        with pytest.raises(Unavailable):
            await client.front.worker.forget_loads()


async def test_a_damaged_point_is_passed_over_for_the_one_before(start_front) -> None:
    clock = ManualClock()
    async with start_front(clock=clock) as client:
        model = await client.model()
        for n in range(3):
            clock.advance(1000)
            await client.train(model, 2 * n + 1, 1)
            await client.settled()
        digest = await client.digest()
        newest = Path(client.front.spec.job_dir) / "recovery"
    (newest,) = [p for p in newest.iterdir() if p.name == max(q.name for q in newest.iterdir())]
    victim = max(newest.rglob("*.safetensors"), key=lambda path: path.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[-1] ^= 1
    victim.write_bytes(data)
    async with start_front(clock=clock) as client:
        await client.result(await client.forward(model, 7))
        assert await client.digest() == digest
        loads = [r for r in client.orders.seen if isinstance(r, LoadRecovery)]
        assert len(loads) == 2
        (recovered,) = client.events("recovered")[-1:]
        assert recovered["replayed"] > 0


async def test_a_request_that_kills_the_engine_twice_fails_and_the_rest_goes_on(
    start_front, orders
) -> None:
    orders.dies_at = [ForwardBackward, ForwardBackward]
    async with start_front(orders=orders) as client:
        model = await client.model()
        poison = await client.result(await client.forward_backward(model, 1))
        assert (poison["error_class"], poison["category"]) == ("engine_failed", "server")
        failed = await client.result(await client.optim_step(model, 2))
        assert failed["error_class"] == "incomplete_gradient"
        await client.train(model, 3, 1)
        assert (await client.status()).step == 1
        assert orders.num_started == 3


async def test_an_engine_that_cannot_start_is_given_up_and_says_why(start_front, orders) -> None:
    orders.dies_at = [OpenModel] * 3
    async with start_front(orders=orders) as client:
        session = await client.session()
        failed = await client.create(session)
        assert (failed["error_class"], failed["category"]) == ("engine_failed", "server")
        status = await client.status()
        assert status.state is TrainerState.FAILED
        assert status.error is not None
        assert (await client.http.get("/api/v1/healthz")).status_code == 503


async def test_while_the_trainer_recovers_requests_are_taken_and_futures_say_why_they_wait(
    start_front, orders, monkeypatch
) -> None:
    from homefire.trainer.front import future_calls

    monkeypatch.setattr(future_calls, "PAUSED_POLL_S", 0.0)
    async with start_front(crash=True) as client:
        model = await client.model()
        await client.train(model, 1, 2)
    orders.holds = ForwardBackward
    async with start_front(orders=orders) as client:
        await orders.reached.wait()
        waiting = await client.forward_backward(model, 5)
        answer = await client.post("retrieve_future", request_id=waiting)
        assert answer.status_code == 408
        assert answer.json()["queue_state"] == "paused_capacity"
        assert "recovering" in answer.json()["queue_state_reason"]
        orders.released.set()
        assert "error" not in await client.result(waiting)


async def test_a_replay_that_differs_is_reported(start_front, orders, monkeypatch) -> None:
    from homefire.trainer.engine import fake

    async with start_front(crash=True) as client:
        model = await client.model()
        await client.train(model, 1, 2)
    monkeypatch.setattr(fake.bigram, "base_weight", _other_base(fake.bigram.base_weight))
    async with start_front() as client:
        await client.result(await client.forward(model, 5))
        status = await client.status()
        assert status.error is not None
        assert status.error.code == "replay_divergence"
        assert status.state is TrainerState.READY
        assert client.events("recovered")[-1]["divergences"]


async def test_a_front_whose_fenced_client_waits_fences_it_after_a_restart_too(
    start_front, orders
) -> None:
    orders.holds = ForwardBackward
    async with start_front(orders=orders, crash=True) as client:
        old = await client.model()
        running = await client.forward_backward(old, 1)
        await orders.reached.wait()
        queued = await client.optim_step(old, 2)
        session = await client.session()
        body = {"session_id": session, "model_seq_id": 0, "base_model": "tiny"}
        created = (await client.post("create_model", **body)).json()["request_id"]
    async with start_front() as client:
        assert (await client.result(running))["error_class"] == "superseded"
        assert (await client.result(queued))["error_class"] == "superseded"
        new = (await client.result(created))["model_id"]
        await client.train(new, 1, 1)
        assert (await client.status()).step == 1


def _other_base(base_weight):
    return lambda vocab_size: base_weight(vocab_size) + 0.5


async def test_a_recovery_says_how_far_it_has_come_and_what_a_crash_would_replay(
    start_front, datum
) -> None:
    clock, later = ManualClock(), Orders(holds=OptimStep)
    async with start_front(clock=clock, recovery_interval_s=60.0, crash=True) as client:
        model = await client.model()
        await client.train(model, 1, 1)
        clock.advance(60)
        await client.train(model, 3, 2)
        assert (await client.status()).num_unsaved == 4, "a point was taken before them"
    async with start_front(clock=clock, orders=later) as client:
        await later.reached.wait()
        status = await client.status()
        assert status.state is TrainerState.RECOVERING
        assert status.replaying is not None
        assert (status.replaying.num_done, status.replaying.num_total) == (1, 4)
        reason = client.front.status.pause_reason
        assert reason == "the trainer is recovering: 1 of 4 operations replayed"
        later.released.set()
        await client.result(await client.forward_backward(model, 7))
        assert (await client.status()).replaying is None
