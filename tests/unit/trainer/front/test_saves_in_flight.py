"""Saves that are written while training goes on: what they hold, and what becomes of them."""

from __future__ import annotations

import asyncio
import errno
from typing import Any

import pytest

from homefire.checkpoints import CheckpointFamily, CheckpointKey
from homefire.foundation.clock import ManualClock
from homefire.trainer.front.journal import read_journal
from homefire.trainer.front.records import PointTaken, SaveEnded, SaveTaken
from homefire.wire.engine import AdoptSnapshot, OptimStep, SaveRecovery, SaveSampler, SaveState
from homefire.wire.errors import StorageFailed


def digest_of(client: Any, name: str) -> str:
    spec = client.front.spec
    key = CheckpointKey(spec.account, spec.job, "policy", CheckpointFamily.SAMPLER, name)
    return client.front.store.manifest(key).digest


async def save(client: Any, model: str, seq: int, name: str, **more: Any) -> str:
    """The request of a delta that waits to be written."""
    body = {"model_id": model, "seq_id": seq, "path": name, "checkpoint_type": "delta", **more}
    return (await client.post("save_weights_for_sampler", **body)).json()["request_id"]


def is_pending(client: Any, request_id: str) -> bool:
    return client.front.futures.is_pending(request_id)


async def taken(orders: Any, count: int) -> None:
    while len(orders.unwritten) < count:
        await asyncio.sleep(0)


async def test_training_goes_on_while_a_save_is_written_and_it_holds_what_it_was_asked_for(
    start_front, orders
) -> None:
    orders.writes_later = True
    async with start_front(orders=orders) as client:
        model = await client.model()
        await client.train(model, 1, 1)
        saved = await save(client, model, 3, "a")
        await taken(orders, 1)
        before = await client.digest()
        await client.train(model, 4, 2)
        assert is_pending(client, saved)
        assert await client.digest() != before
        orders.unwritten[0].finish()
        result = await client.result(saved)
        assert (result["step"], result["digest"]) == (1, before)
        assert digest_of(client, "a") == before
        (event,) = client.events("snapshot_saved")
        assert event["step"] == 1
        orders.writes_later = False


async def test_two_saves_in_flight_end_in_their_order(start_front, orders) -> None:
    """Whichever the engine reports first, and the second is a delta of the first."""
    orders.writes_later = True
    async with start_front(orders=orders) as client:
        model = await client.model()
        first = await save(client, model, 1, "a")
        await client.train(model, 2, 1)
        second = await save(client, model, 4, "b")
        await taken(orders, 2)
        one, two = orders.unwritten
        replies = [one.write(), two.write()]
        two.ended.set_result(replies[1])
        await client.train(model, 5, 1)
        assert is_pending(client, first)
        assert is_pending(client, second)
        one.ended.set_result(replies[0])
        assert (await client.result(second))["parent"] == "a"
        assert not is_pending(client, first)
        orders.writes_later = False


@pytest.mark.parametrize("crash", [False, True], ids=["the engine dies", "the front is killed"])
async def test_a_save_in_flight_is_done_again_by_the_replay_with_the_same_bytes(
    start_front, orders, crash: bool
) -> None:
    orders.writes_later = True
    async with start_front(orders=orders, crash=crash) as client:
        model = await client.model()
        await client.train(model, 1, 1)
        requests = [await save(client, model, 3, "a")]
        await taken(orders, 1)
        at_a = await client.digest()
        await client.train(model, 4, 1)
        requests.append(await save(client, model, 6, "b"))
        await taken(orders, 2)
        at_b = await client.digest()
        orders.writes_later = False
        if not crash:
            orders.dies_at = [OptimStep]
            await client.train(model, 7, 1)
            results = [await client.result(request) for request in requests]
    if crash:
        async with start_front() as client:
            results = [await client.result(request) for request in requests]
            await client.train(model, 7, 1)
            assert (await client.status()).error is None
    assert [result["digest"] for result in results] == [at_a, at_b]
    assert [result["step"] for result in results] == [1, 2]
    assert (results[1]["kind"], results[1]["parent"]) == ("delta", "a")
    assert [digest_of(client, name) for name in "ab"] == [at_a, at_b]


async def test_a_save_that_was_committed_before_its_end_was_recorded_is_found(
    start_front, orders
) -> None:
    orders.writes_later = True
    async with start_front(orders=orders, crash=True) as client:
        model = await client.model()
        await client.train(model, 1, 1)
        request = await save(client, model, 3, "a")
        await taken(orders, 1)
        orders.unwritten[0].write()
        digest = await client.digest()
    async with start_front() as client:
        result = await client.result(request)
        assert (result["digest"], result["note"]) == (digest, "saved before")


async def test_a_save_of_which_engines_die_fails_and_training_goes_on(start_front, orders) -> None:
    orders.writes_later = True
    async with start_front(orders=orders) as client:
        model = await client.model()
        await client.train(model, 1, 1)
        request = await save(client, model, 3, "a")
        await taken(orders, 1)
        orders.writes_later = False
        orders.dies_of = lambda asked: isinstance(asked, SaveSampler)
        orders.dies_at = [OptimStep]
        await client.train(model, 4, 1)
        assert "died 2 times" in (await client.result(request))["error"]
        await client.train(model, 6, 1)
        assert (await client.status()).engine_restarts == 2


async def test_a_save_that_cannot_be_written_fails_alone(start_front, orders) -> None:
    def full() -> Any:
        raise StorageFailed("no space left") from OSError(errno.ENOSPC, "planted")

    orders.writes_later = True
    async with start_front(orders=orders) as client:
        model = await client.model()
        lost = await save(client, model, 1, "a")
        kept = await save(client, model, 2, "b")
        await taken(orders, 2)
        await client.train(model, 3, 1)
        orders.unwritten[0].write = full
        for unwritten in orders.unwritten:
            unwritten.finish()
        assert "no space left" in (await client.result(lost))["error"]
        assert (await client.result(kept))["kind"] == "base"
        orders.writes_later = False


async def test_a_point_counts_only_when_the_saves_before_it_have_ended(start_front, orders) -> None:
    clock = ManualClock()
    orders.writes_later = True
    async with start_front(orders=orders, clock=clock, crash=True) as client:
        model = await client.model()
        await client.train(model, 1, 1)
        saved = await save(client, model, 3, "a")
        await taken(orders, 1)
        clock.advance(1e6)
        await client.train(model, 4, 1)
        await taken(orders, 2)
        snapshot, point = orders.unwritten
        assert isinstance(point.request, SaveRecovery)
        point.ended.set_result(point.write())
        await client.train(model, 6, 1)
        assert client.front.ledger.points == []
        snapshot.finish()
        await client.settled()
        await client.result(saved)
        kinds = (SaveTaken, SaveEnded, PointTaken)
        found = [r for _, r in read_journal(client.front.journal.directory) if isinstance(r, kinds)]
        assert [type(record) for record in found] == [*kinds]
        digest = await client.digest()
    async with start_front(clock=clock) as client:
        await client.result(await client.forward(model, 8))
        assert await client.digest() == digest
        assert (await client.status()).error is None


async def test_a_load_waits_for_the_state_that_is_being_written(start_front, orders) -> None:
    async with start_front(orders=orders) as client:
        model = await client.model()
        await client.train(model, 1, 1)
        digest = await client.digest()
        orders.writes_later = True
        body = {"model_id": model, "path": "s"}
        await client.post("save_weights", seq_id=3, **body)
        await taken(orders, 1)
        await client.train(model, 4, 1)
        loading = await client.post("load_weights", seq_id=6, optimizer=True, **body)
        await asyncio.sleep(0)
        assert isinstance(orders.unwritten[0].request, SaveState)
        orders.writes_later = False
        orders.unwritten[0].finish()
        assert (await client.result(loading.json()["request_id"]))["step"] == 1
        assert await client.digest() == digest


async def test_a_replayed_save_that_ended_is_adopted_not_written_again(start_front) -> None:
    async with start_front(crash=True) as client:
        model = await client.model()
        await client.train(model, 1, 1)
        await client.call("save_weights_for_sampler", model, 3, path="a")
    async with start_front() as client:
        await client.train(model, 4, 1)
        seen = [type(request) for request in client.orders.seen]
        assert AdoptSnapshot in seen
        assert SaveSampler not in seen
