from __future__ import annotations

import asyncio
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from homefire.foundation.events import read_events
from homefire.inference.engine.opening import open_engine
from homefire.inference.engine.protocol import InferenceEngine, Publish
from homefire.wire.internal import HotLoadStage
from homefire.wire.specs import ReplicaSpec
from unit.inference.caller import Caller
from unit.inference.canaries import Snapshots

ASK = {
    "prompt": [1, 2],
    "max_tokens": 6,
    "temperature": 0,
    "return_token_ids": True,
    "ignore_eos": True,
}


async def tokens(caller: Caller) -> list[int]:
    return (await caller.complete(**ASK)).json()["choices"][0]["token_ids"]


async def test_a_base_then_deltas_then_back_are_served(
    start_replica: Any, snapshots: Snapshots
) -> None:
    async with start_replica() as caller:
        before = await tokens(caller)
        served = []
        for identity in (
            snapshots.base(5),
            snapshots.delta(6, parent=5),
            snapshots.delta(7, parent=6),
            "step-5",
            "step-7",
        ):
            status = await caller.hot_load(identity)
            assert (status.stage, status.identity, status.error) == ("idle", identity, "")
            assert status.digest == snapshots.written[int(identity[-1])].digest
            served.append((await tokens(caller))[0])
        assert (await caller.hot_load(None)).identity is None
        after = await tokens(caller)
    assert served == [5, 6, 7, 5, 7]
    assert before == after


async def test_a_late_replica_walks_the_chain_from_its_base(
    start_replica: Any, snapshots: Snapshots
) -> None:
    snapshots.base(5)
    snapshots.delta(6, parent=5)
    async with start_replica() as caller:
        status = await caller.hot_load(snapshots.delta(7, parent=6))
        assert (status.identity, await tokens(caller)) == ("step-7", [7] * 6)


def truncate(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def flip(directory: Path) -> None:
    file = directory / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-7] ^= 1
    file.write_bytes(data)


def lie(directory: Path) -> None:
    file = directory / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["digest"] = "0" * 64
    file.write_text(json.dumps(manifest))


@pytest.mark.parametrize("damage", [truncate, flip, lie])
async def test_a_damaged_snapshot_leaves_the_old_weights_serving(
    start_replica: Any, snapshots: Snapshots, damage: Any
) -> None:
    good, bad = snapshots.base(5), snapshots.base(6)
    damage(snapshots.store.directory(snapshots.key(bad)))
    async with start_replica() as caller:
        await caller.hot_load(good)
        status = await caller.hot_load(bad)
        assert (status.stage, status.target) == (HotLoadStage.ERROR, bad)
        assert status.error
        assert (status.ready, status.identity) == (True, good)
        assert await tokens(caller) == [5] * 6
        assert [entry.ok for entry in status.ledger] == [True, False]


@pytest.mark.parametrize("identity", ["step-404", "../../etc", "a/b"])
async def test_an_unknown_identity_ends_in_an_error_that_names_it(
    start_replica: Any, identity: str
) -> None:
    async with start_replica() as caller:
        status = await caller.hot_load(identity)
        assert (status.stage, status.target) == (HotLoadStage.ERROR, identity)
        assert identity in status.error
        assert status.identity is None
        assert len(await tokens(caller)) == 6


async def test_an_error_is_forgotten_with_the_next_load(
    start_replica: Any, snapshots: Snapshots
) -> None:
    async with start_replica() as caller:
        await caller.hot_load("step-404")
        status = await caller.hot_load(snapshots.base(5))
        assert (status.stage, status.error, status.target) == (HotLoadStage.IDLE, "", None)


async def test_a_snapshot_needs_a_location(start_replica: Any) -> None:
    async with start_replica() as caller:
        answered = await caller.post("/internal/hot_load", {"identity": "step-5"})
    assert answered.status == 400
    assert answered.json()["error"]["param"] == "location"


async def test_the_newest_request_is_taken_up_after_the_load_in_progress(
    start_replica: Any, snapshots: Snapshots
) -> None:
    first, *others = [snapshots.base(token) for token in range(4)]
    location = {"account": "local", "job": "job-1"}
    async with start_replica(max_context_length=1 << 22) as caller:
        endless = {**ASK, "max_tokens": 1 << 21, "stream": True}
        running = asyncio.create_task(caller.complete(**endless))
        async with asyncio.timeout(20):
            while not (await caller.status()).running:
                await asyncio.sleep(0)
        await caller.post("/internal/hot_load", {"identity": first, "location": location})
        await caller.wait(lambda status: status.stage == HotLoadStage.DRAINING)
        for identity in others:
            await caller.post("/internal/hot_load", {"identity": identity, "location": location})
        running.cancel()
        status = await caller.wait(lambda status: len(status.ledger) == 2)
        assert [entry.identity for entry in status.ledger] == [first, others[-1]]


@pytest.mark.parametrize(
    ("transition", "status", "answered_by"), [("SYNC", 425, None), ("DRAIN", 200, "step-5")]
)
async def test_a_sync_transition_refuses_what_comes_while_the_weights_are_swapped(
    start_replica: Any, snapshots: Snapshots, transition: str, status: int, answered_by: str | None
) -> None:
    """The others wait for the new weights. What runs ends on the old ones in both."""
    location = {"account": "local", "job": "job-1"}
    body = {"identity": snapshots.base(5), "location": location, "transition": transition}
    async with start_replica(max_context_length=1 << 22) as caller:
        endless = {**ASK, "max_tokens": 1 << 21, "stream": True}
        running = asyncio.create_task(caller.complete(**endless))
        async with asyncio.timeout(20):
            while not (await caller.status()).running:
                await asyncio.sleep(0)
        await caller.post("/internal/hot_load", body)
        await caller.wait(lambda status: status.stage == HotLoadStage.DRAINING)
        late = asyncio.create_task(caller.complete(**ASK))
        async with asyncio.timeout(20):
            while not (late.done() or (await caller.status()).queued):
                await asyncio.sleep(0)
        running.cancel()
        await caller.wait(lambda status: status.identity == "step-5")
        answered = await late
        assert answered.status == status
        if answered_by is None:
            assert answered.json()["error"]["code"] == "swap_in_progress"
        else:
            assert answered.headers["x-homefire-weights"].startswith(answered_by)
        assert (await caller.complete(**ASK)).status == 200


async def test_a_strict_drain_that_times_out_is_an_error_and_the_stream_goes_on(
    start_replica: Any, snapshots: Snapshots
) -> None:
    async with start_replica(max_context_length=1 << 22, drain_timeout_s=0.0) as caller:
        endless = {**ASK, "max_tokens": 1 << 21, "stream": True}
        running = asyncio.create_task(caller.complete(**endless))
        async with asyncio.timeout(20):
            while not (await caller.status()).running:
                await asyncio.sleep(0)
        status = await caller.hot_load(snapshots.base(5), drain="strict")
        assert (status.stage, status.target, status.running) == (HotLoadStage.ERROR, "step-5", 1)
        assert "still ran" in status.error
        assert status.error_code == "hot_load_failed"
        running.cancel()


async def test_what_is_wanted_before_the_engine_is_ready_is_loaded_then(
    start_replica: Any, snapshots: Snapshots
) -> None:
    may_open = asyncio.Event()
    loop = asyncio.get_running_loop()

    def open_late(spec: ReplicaSpec, publish: Publish) -> InferenceEngine:
        asyncio.run_coroutine_threadsafe(may_open.wait(), loop).result(20)
        return open_engine(spec, publish)

    async with start_replica(engine=open_late, wait=False) as caller:
        body = {"identity": snapshots.base(5), "location": {"account": "local", "job": "job-1"}}
        answered = await caller.post("/internal/hot_load", body)
        assert answered.json()["stage"] == "loading"
        may_open.set()
        await caller.wait(lambda status: status.identity == "step-5")


async def test_loads_are_recorded(start_replica: Any, snapshots: Snapshots, tmp_path: Path) -> None:
    async with start_replica() as caller:
        await caller.hot_load(snapshots.base(5))
        await caller.hot_load("step-404")
    events = [event for _, event in read_events(tmp_path / "replica" / "events.jsonl")]
    assert [event["event"] for event in events] == ["started", "hot_load", "hot_load"]
    assert [event.get("ok") for event in events[1:]] == [True, False]
    assert events[1]["digest"] == snapshots.written[5].digest
    assert events[1].keys() >= {"at", "identity", "load_ms", "drain_ms", "error"}


async def test_a_status_is_held_until_it_changes(start_replica: Any, snapshots: Snapshots) -> None:
    async with start_replica() as caller:
        version = (await caller.status()).version
        held = asyncio.create_task(caller.status(f"after={version}&wait_s=20"))
        for _ in range(5):
            await asyncio.sleep(0)
        assert not held.done()
        await caller.hot_load(snapshots.base(5))
        assert (await held).version > version


async def test_no_answer_mixes_weights_while_they_change_under_load(
    start_replica: Any, snapshots: Snapshots
) -> None:
    """Canaries: all tokens of an answer are the one that its own label promises."""
    identities = [snapshots.base(1), *(snapshots.delta(k, parent=k - 1) for k in range(2, 11))]
    async with start_replica(max_running=16) as caller:
        await caller.hot_load(identities[0])
        seen: Counter[str] = Counter()
        done = asyncio.Event()

        async def client(number: int) -> None:
            while not done.is_set():
                answered = await caller.complete(
                    **{
                        **ASK,
                        "max_tokens": 3 + number % 40,
                        "n": 1 + number % 3,
                        "raw_output": True,
                    },
                    stream=number % 2 == 0,
                )
                check(answered, seen)

        clients = [asyncio.create_task(client(number)) for number in range(32)]
        for identity in identities[1:]:
            status = await caller.hot_load(identity)
            assert status.identity == identity
            await caller.complete(**ASK)
        done.set()
        await asyncio.gather(*clients)
    assert len(seen) >= 5
    assert sum(seen.values()) > 100


def check(answered: Any, seen: Counter[str]) -> None:
    assert answered.status == 200
    streamed = answered.headers["content-type"].startswith("text/event-stream")
    parts = answered.events() if streamed else [answered.json()]
    label = parts[-1]["homefire"]["weights"]["identity"]
    token = int(label.removeprefix("step-"))
    made = [
        made
        for part in parts
        for choice in part["choices"]
        for made in choice.get("raw_output", {}).get("completion_token_ids", [])
    ]
    assert set(made) == {token}
    assert answered.headers["x-homefire-weights"].startswith(f"{label}; sha=")
    assert {part["model"].rpartition("@")[2] for part in parts} == {label}
    seen[label] += 1


async def test_a_replica_that_lost_its_weights_is_not_ready(
    start_replica: Any, snapshots: Snapshots
) -> None:
    def open_fragile(spec: ReplicaSpec, publish: Publish) -> InferenceEngine:
        engine: Any = open_engine(spec, publish)
        engine._network.install = lambda weights: "the digest of something else"
        return engine

    async with start_replica(engine=open_fragile) as caller:
        status = await caller.hot_load(snapshots.base(5))
        answered = await caller.complete(**ASK)
    assert (status.ready, status.stage) == (False, HotLoadStage.ERROR)
    assert "restart the replica" in status.error
    assert answered.status == 500
