"""Requests of several tenants that run as one packed pass: who joins, in which order, what survives.

The fake engine's bits depend on how many adapters a pass has, as a real one's do. So a replay that packs
otherwise ends elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from homefire.foundation.clock import ManualClock
from homefire.wire.engine import ForwardBackward, OptimStep, PackedForwardBackward, Request
from homefire.wire.specs import TrainerMode
from unit.trainer.front.conftest import Client, Orders, make_datum, tensor

SESSIONS = [f"ts-{n:016x}" for n in range(4)]
TENANTS = [f"{session}:train:0" for session in SESSIONS]
POOL = {"pooled": True, "mode": TrainerMode.LORA, "job": "pool-1"}
BREAKING = -1000.0
"""A behaviour policy's logprob that makes the importance ratio infinite."""
_numbers = itertools.count()


@pytest.fixture
def start_pool(start_front) -> Callable[..., Any]:
    return lambda **options: start_front(**{**POOL, **options})


async def open_tenants(client: Client, count: int = 3, **more: Any) -> list[str]:
    """Models that have trained a step, so that every number of theirs counts."""
    made = [
        await client.create(session, lora_config={"rank": 4}, base_model="x", **more)
        for session in SESSIONS[:count]
    ]
    models = [answer["model_id"] for answer in made]
    for model in models:
        await client.train(model, 1, 1)
    client.orders.seen.clear()
    return models


@contextlib.asynccontextmanager
async def engine_busy(client: Client, model: str, seq: int) -> AsyncIterator[None]:
    """What is submitted in the block waits together, behind a request of `model`."""
    orders = client.orders
    orders.reached, orders.released = asyncio.Event(), asyncio.Event()
    orders.holds = ForwardBackward
    request = await client.forward_backward(model, seq)
    await orders.reached.wait()
    try:
        yield
    finally:
        orders.holds = None
        orders.released.set()
    await client.result(request)


def ran(client: Client) -> list[tuple[str, ...]]:
    """Which slots each backward pass had, in order."""
    return [
        tuple(member.slot for member in request.members)
        if isinstance(request, PackedForwardBackward)
        else (request.slot,)
        for request in client.orders.seen
        if isinstance(request, ForwardBackward | PackedForwardBackward)
    ]


def policy_datum(full: list[int], logprob: float = -4.0) -> dict[str, Any]:
    """Of importance sampling."""
    given = make_datum(full)
    count = len(full) - 1
    given["loss_fn_inputs"] |= {
        "logprobs": tensor([-4.0] * (count - 1) + [logprob], "float32"),
        "advantages": tensor([1.0] * count, "float32"),
    }
    return given


# Who joins -------------------------------------------------------------------------------------


async def test_what_waits_for_the_engine_runs_as_one_pass(start_pool) -> None:
    async with start_pool() as client:
        first, second, third = await open_tenants(client)
        async with engine_busy(client, first, 3):
            requests = [
                await client.forward_backward(model, seq, data=[make_datum(tokens)])
                for model, seq, tokens in (
                    (second, 3, [5, 6, 7, 8]),
                    (third, 3, [9, 8]),
                    (first, 4, [3, 4, 5]),
                )
            ]
        results = [await client.result(request) for request in requests]
        assert ran(client) == [(first,), (second, third, first)]
        assert [r["metrics"]["tokens:sum"] for r in results] == [3, 1, 2]
        shapes = [r["loss_fn_outputs"][0]["logprobs"]["shape"] for r in results]
        assert shapes == [[3], [1], [2]]


async def test_a_packed_result_is_that_of_a_pass_alone(start_pool) -> None:
    """To the digits that the fake engine changes on purpose."""
    results: list[list[Any]] = []
    for alone in ("true", "false"):
        async with start_pool(job=f"pool-{alone}") as client:
            models = await open_tenants(client, user_metadata={"homefire.own_passes": alone})
            async with engine_busy(client, models[0], 3):
                data = [policy_datum([1, 2, 3]), policy_datum([4, 5])]
                requests = [
                    await client.forward_backward(
                        model, 3, loss_fn="importance_sampling", data=data
                    )
                    for model in models[1:]
                ]
            answers = [await client.result(request) for request in requests]
            steps = [await client.result(await client.optim_step(m, 4)) for m in models[1:]]
            assert (len(ran(client)) == 3) == (alone == "true")
            results.append([*answers, *steps])
    for ours, theirs in zip(*results, strict=True):
        for name, value in theirs["metrics"].items():
            assert ours["metrics"][name] == pytest.approx(value, rel=1e-4), name


async def test_a_request_with_no_other_beside_it_runs_at_once(start_pool) -> None:
    async with start_pool() as client:
        models = await open_tenants(client)
        for model in models:
            await client.result(await client.forward_backward(model, 3))
        assert ran(client) == [(model,) for model in models]


async def test_two_requests_of_one_model_are_never_in_one_pass(start_pool) -> None:
    async with start_pool() as client:
        first, second, _ = await open_tenants(client)
        async with engine_busy(client, first, 3):
            requests = [await client.forward_backward(second, seq) for seq in (3, 4)]
            requests.append(await client.forward_backward(first, 4))
            requests.append(await client.optim_step(second, 5))
        stepped = [await client.result(request) for request in requests][-1]
        assert stepped["metrics"]["num_backward_calls"] == 2
        assert ran(client) == [(first,), (second, first), (second,)]


async def test_a_pass_has_no_more_tokens_than_a_micro_batch(start_pool) -> None:
    async with start_pool(micro_batch_tokens=8) as client:
        first, second, third, fourth = await open_tenants(client, 4)
        async with engine_busy(client, first, 3):
            data = {second: 4, third: 5, fourth: 4}
            for model, count in data.items():
                tokens = list(range(count + 1))
                await client.forward_backward(model, 3, data=[make_datum(tokens)])
        for model in data:
            await client.result(await client.optim_step(model, 4))
        assert ran(client) == [(first,), (second, fourth), (third,)]


async def test_a_model_that_asks_for_passes_of_its_own_has_them(start_pool) -> None:
    async with start_pool() as client:
        models = await open_tenants(client)
        mine = {"user_metadata": {"homefire.own_passes": "true"}}
        made = await client.create(SESSIONS[3], lora_config={"rank": 4}, base_model="x", **mine)
        async with engine_busy(client, models[0], 3):
            for model, seq in ((models[1], 3), (made["model_id"], 1), (models[2], 3)):
                await client.forward_backward(model, seq)
        await client.result(await client.optim_step(made["model_id"], 2))
        assert sorted(ran(client)) == sorted(
            [(models[0],), (models[1], models[2]), (made["model_id"],)]
        )
        mine["user_metadata"]["homefire.own_passes"] = "perhaps"
        refused = await client.create(SESSIONS[3], 1, lora_config={"rank": 4}, **mine)
        assert "'homefire.own_passes' is 'perhaps'" in refused["error"]


async def test_no_tenant_waits_for_all_that_another_has_queued(start_pool) -> None:
    """Even where a pass of the large tenant leaves no room for a second one."""
    async with start_pool(micro_batch_tokens=8) as client:
        large, small, _ = await open_tenants(client)
        async with engine_busy(client, large, 3):
            for seq in range(4, 14):
                await client.forward_backward(large, seq, data=[make_datum(list(range(9)))])
            mine = [await client.forward_backward(small, 3), await client.optim_step(small, 4)]
        for request in mine:
            await client.result(request)
        order = [r for r in client.orders.seen if isinstance(r, ForwardBackward | OptimStep)]
        assert [r.slot for r in order][:4] == [large, small, large, small]
        await client.result(await client.optim_step(large, 14))
        assert ran(client).count((large,)) == 11


async def test_a_dedicated_job_runs_its_requests_as_they_came(start_front) -> None:
    async with start_front(mode=TrainerMode.LORA) as client:
        model = (await client.create(await client.session(), lora_config={"rank": 4}))["model_id"]
        async with engine_busy(client, model, 1):
            requests = [await client.forward_backward(model, seq) for seq in (2, 3)]
        for request in requests:
            await client.result(request)
        assert ran(client) == [("policy",)] * 3


# Failing alone ---------------------------------------------------------------------------------


async def test_a_request_that_is_wrong_does_not_join_and_fails_alone(start_pool) -> None:
    async with start_pool() as client:
        first, second, third = await open_tenants(client)
        async with engine_busy(client, first, 3):
            bad = await client.forward_backward(second, 3, data=[make_datum([1, 99])])
            good = [await client.forward_backward(m, s) for m, s in ((third, 3), (first, 4))]
        assert "99" in (await client.result(bad))["error"]
        assert all(["error" not in await client.result(request) for request in good])
        assert ran(client) == [(first,), (third, first)]


async def test_a_loss_that_breaks_fails_its_request_and_no_other(start_pool) -> None:
    digests: list[str] = []
    for logprob in (BREAKING, -4.0):
        async with start_pool(job=f"pool-{logprob}") as client:
            first, second, third = await open_tenants(client)
            async with engine_busy(client, first, 3):
                requests = [
                    await client.forward_backward(
                        model,
                        3,
                        loss_fn="importance_sampling",
                        data=[policy_datum([1, 2, 3], logprob if model == second else -4.0)],
                    )
                    for model in (second, third)
                ]
            broken, fine = [await client.result(request) for request in requests]
            assert ran(client)[-1] == (second, third)
            assert "error" not in fine
            stepped = await client.result(await client.optim_step(second, 4))
            if logprob == -4.0:
                assert "error" not in broken
                assert "error" not in stepped
            else:
                assert broken["error_class"] == "non_finite_gradient"
                assert stepped["error_class"] == "incomplete_gradient"
            await client.result(await client.optim_step(third, 4))
            digests.append(await client.digest(third))
    assert digests[0] == digests[1]


# Deaths ----------------------------------------------------------------------------------------


async def submit_round(client: Client, models: list[str], seq: int) -> list[dict[str, Any]]:
    """A backward of each behind the first one's, then a step of each; the results of the steps."""
    async with engine_busy(client, models[0], seq):
        for number, model in enumerate(models):
            more = {"data": [make_datum([seq, 2 + number, 3, 4 + number])]}
            await client.forward_backward(model, seq + (model == models[0]), **more)
    steps = [await client.optim_step(model, seq + 1 + (model == models[0])) for model in models]
    return [await client.result(step) for step in steps]


async def test_an_engine_that_dies_of_a_pack_is_followed_by_each_request_alone(start_pool) -> None:
    orders = Orders()
    async with start_pool(orders=orders) as client:
        models = await open_tenants(client)
        orders.dies_at.append(PackedForwardBackward)
        results = await submit_round(client, models, 3)
        assert [r["metrics"]["num_backward_calls"] for r in results] == [2, 1, 1]
        assert ran(client)[-3:] == [(models[1],), (models[2],), (models[0],)]
        assert (await client.status()).engine_restarts == 1
        await submit_round(client, models[1:], 5)
        assert ran(client)[-1] == (models[2], models[1]), "later requests are packed again"


def is_poisonous(request: Request) -> bool:
    """ppo, alone or in a pack."""
    passes = request.members if isinstance(request, PackedForwardBackward) else [request]
    return any(isinstance(p, ForwardBackward) and p.loss_fn == "ppo" for p in passes)


async def test_a_request_that_kills_alone_too_fails_and_the_others_are_done(start_pool) -> None:
    orders = Orders()
    async with start_pool(orders=orders) as client:
        models = await open_tenants(client)
        orders.dies_of = is_poisonous
        async with engine_busy(client, models[0], 3):
            requests = [
                await client.forward_backward(
                    models[1], 3, data=[policy_datum([1, 2])], loss_fn="ppo"
                ),
                await client.forward_backward(models[2], 3),
            ]
        poison, innocent = [await client.result(request) for request in requests]
        assert poison["error_class"] == "engine_failed"
        assert "died 2 times" in poison["error"]
        assert "error" not in innocent
        assert (await client.status()).engine_restarts == 2
        assert ran(client).count((models[1], models[2])) == 1


async def test_a_pack_is_replayed_as_the_same_pack(start_pool) -> None:
    """Twice: from the base model, and behind a recovery point that lies between two packs."""
    clock = ManualClock()
    async with start_pool(clock=clock, crash=True) as client:
        models = await open_tenants(client)
        await submit_round(client, models, 3)
        packs = [pack for pack in ran(client) if len(pack) > 1]
        digests = [await client.digest(model) for model in models]
    async with start_pool(clock=clock, crash=True) as client:
        assert "error" not in await client.result(await client.forward_backward(models[1], 5))
        assert [pack for pack in ran(client) if len(pack) > 1] == packs
        assert [await client.digest(model) for model in models] == digests
        assert client.events("recovered")[-1]["divergences"] == []
        clock.advance(61)
        await client.result(await client.optim_step(models[1], 6))
        await client.train(models[2], 5, 1)
        await submit_round(client, models[1:], 7)
        digests = [await client.digest(model) for model in models]
    assert client.events("recovery_point")
    async with start_pool(clock=clock) as client:
        await client.result(await client.forward_backward(models[0], 6))
        assert [await client.digest(model) for model in models] == digests
        recovered = client.events("recovered")[-1]
        assert recovered["divergences"] == []
        assert recovered["point"] is not None
        assert [pack for pack in ran(client) if len(pack) > 1] == [(models[2], models[1])]


async def test_a_pack_without_results_at_the_end_of_the_journal_is_not_run_again(
    start_pool,
) -> None:
    """The machine may have died of it."""
    orders = Orders()
    async with start_pool(orders=orders, crash=True) as client:
        models = await open_tenants(client)
        orders.released = asyncio.Event()
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(engine_busy(client, models[0], 3))
            requests = [await client.forward_backward(model, 3) for model in models[1:]]
            orders.reached = asyncio.Event()
            first_released, orders.released = orders.released, asyncio.Event()
            orders.holds = PackedForwardBackward
            first_released.set()
            await orders.reached.wait()
            stack.pop_all()
    async with start_pool() as client:
        assert all(["error" not in await client.result(request) for request in requests])
        assert sorted(ran(client)[-2:]) == sorted((model,) for model in models[1:])
        assert not any(len(pack) > 1 for pack in ran(client))


async def test_an_engine_that_packs_no_more_replays_each_alone_and_says_so(
    start_pool, monkeypatch
) -> None:
    async with start_pool(crash=True) as client:
        models = await open_tenants(client)
        await submit_round(client, models, 3)
        before = [await client.digest(model) for model in models]
    monkeypatch.setattr(
        "homefire.trainer.engine.fake.BigramNetwork.shares_passes", lambda *_: False
    )
    async with start_pool() as client:
        await client.result(await client.forward_backward(models[1], 5))
        stepped = await client.result(await client.optim_step(models[1], 6))
        assert stepped["step"] == 3
        assert client.events("recovered")[-1]["divergences"] != []
        assert (await client.status()).error is not None
        assert [await client.digest(model) for model in models] != before


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rounds=st.lists(
        st.lists(st.tuples(st.integers(0, 2), st.sampled_from("bbbfs")), min_size=1, max_size=10),
        min_size=1,
        max_size=3,
    ),
    deaths=st.lists(
        st.sampled_from([PackedForwardBackward, ForwardBackward, OptimStep]), max_size=3
    ),
)
def test_whatever_is_queued_together_and_dies_a_replay_ends_with_the_same_bits(
    start_pool, rounds: list[list[tuple[int, str]]], deaths: list[Any]
) -> None:
    asyncio.run(_live_and_replay(start_pool, rounds, deaths))


async def _live_and_replay(
    start_pool, rounds: list[list[tuple[int, str]]], deaths: list[Any]
) -> None:
    options = {"job": f"pool-{next(_numbers)}", "clock": ManualClock()}
    orders = Orders()
    async with start_pool(orders=orders, crash=True, **options) as client:
        models = await open_tenants(client)
        seqs = [3, 3, 3]
        orders.dies_at = list(deaths)
        for queued in rounds:
            requests: list[str] = []
            for number, what in queued:
                requests.append(await _submit(client, models[number], what, seqs[number]))
                seqs[number] += 1
            for request in requests:
                await client.result(request)
        orders.dies_at = []
        digests = [await client.digest(model) for model in models]
        steps = (await client.status()).step
    async with start_pool(**options) as client:
        for model, seq in zip(models, seqs, strict=True):
            await client.result(await client.forward(model, seq))
        assert [await client.digest(model) for model in models] == digests
        assert client.events("recovered")[-1]["divergences"] == []
        assert (await client.status()).step == steps


async def _submit(client: Client, model: str, what: str, seq: int) -> str:
    match what:
        case "b":
            return await client.forward_backward(model, seq, data=[make_datum([seq, 2, 3, 4])])
        case "f":
            data = [policy_datum([1, 2, 3], BREAKING)]
            return await client.forward_backward(
                model, seq, loss_fn="importance_sampling", data=data
            )
        case _:
            return await client.optim_step(model, seq)
