"""Clients that go away, and clients that read slowly: neither keeps a slot, nor anybody else."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from homefire.inference.engine.opening import open_engine
from homefire.inference.engine.protocol import InferenceEngine, Publish
from homefire.wire.specs import ReplicaSpec
from unit.inference.caller import Answered, Caller

LONG = 1 << 20


def asked(max_tokens: int, **fields: Any) -> dict[str, Any]:
    return {"prompt": [1, 2], "max_tokens": max_tokens, "ignore_eos": True, **fields}


async def stream(caller: Caller, max_tokens: int, **options: Any) -> Answered:
    body = asked(max_tokens, stream=True, raw_output=True)
    return await caller.post("/inference/v1/completions", body, **options)


def num_tokens(answered: Answered) -> int:
    raw = answered.events()[-1]["choices"][0]["raw_output"]
    return len(raw["completion_token_ids"])


async def test_clients_that_leave_at_any_token_leave_no_slot_taken(start_replica: Any) -> None:
    async with start_replica(max_context_length=1 << 22) as caller:
        leaving = [
            stream(caller, LONG, hang_up=lambda got, after=i: got.count(b"data: ") > after % 7)
            for i in range(100)
        ]
        staying = [stream(caller, 5 + i) for i in range(50)]
        answers = await asyncio.gather(*leaving, *staying)
        await caller.until_idle()
        status = await caller.status()
    assert [num_tokens(answered) for answered in answers[100:]] == [5 + i for i in range(50)]
    assert (status.running, status.queued) == (0, 0)


async def test_a_slot_is_free_one_step_after_its_client_left(start_replica: Any) -> None:
    """Counted in the engine's thread: rows decoded after the cancellation reached the engine."""
    events: list[str] = []

    def open_counting(spec: ReplicaSpec, publish: Publish) -> InferenceEngine:
        engine: Any = open_engine(spec, publish)
        decode, cancel = engine._network.decode, engine.cancel
        engine._network.decode = lambda tokens, *rest: [
            events.append("decode"),
            decode(tokens, *rest),
        ][1]
        engine.cancel = lambda ticket: [events.append("cancel"), cancel(ticket)][1]
        return engine

    async with start_replica(engine=open_counting, max_context_length=1 << 22) as caller:
        await stream(caller, LONG, hang_up=lambda got: True)
        await caller.until_idle()
    assert events.count("cancel") == 1
    assert events[events.index("cancel") :].count("decode") <= 2


async def test_a_slow_reader_holds_neither_its_slot_nor_the_others(start_replica: Any) -> None:
    may_read, has_begun = asyncio.Event(), asyncio.Event()

    async def slowly(got: bytes) -> None:
        has_begun.set()
        await may_read.wait()

    async with start_replica(max_context_length=1 << 22) as caller:
        slow = asyncio.create_task(stream(caller, 3_000, reader=slowly))
        await has_begun.wait()
        others = await asyncio.gather(*(stream(caller, 20) for _ in range(20)))
        await caller.until_idle()
        assert not slow.done()
        may_read.set()
        answered = await slow
    assert {num_tokens(other) for other in others} == {20}
    assert num_tokens(answered) == 3_000
    assert len(answered.events()) < 100


async def test_what_waits_for_a_slow_reader_is_bounded_by_what_it_asked_for(
    start_replica: Any,
) -> None:
    """Its tokens wait in memory as they are, not as events: they become one when it reads on."""
    may_read, has_begun = asyncio.Event(), asyncio.Event()
    sizes: list[int] = []

    async def slowly(got: bytes) -> None:
        sizes.append(len(got))
        has_begun.set()
        await may_read.wait()

    async with start_replica(max_context_length=1 << 22) as caller:
        slow = asyncio.create_task(stream(caller, 3_000, reader=slowly))
        await has_begun.wait()
        await caller.until_idle()
        may_read.set()
        await slow
    assert len(sizes) <= 3


@pytest.mark.parametrize("is_stalled", [True, False])
async def test_a_slow_reader_that_leaves_is_cancelled(start_replica: Any, is_stalled: bool) -> None:
    has_begun = asyncio.Event()

    async def slowly(got: bytes) -> None:
        has_begun.set()
        if is_stalled:
            await asyncio.Event().wait()

    async with start_replica(max_context_length=1 << 22) as caller:
        slow = asyncio.create_task(stream(caller, LONG, reader=slowly))
        await has_begun.wait()
        assert (await caller.status()).running == 1
        slow.cancel()
        await caller.until_idle()
        assert slow.done()
