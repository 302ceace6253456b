from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest

from homefire.inference.replica.weight_turns import WeightTurns
from homefire.wire.errors import HotLoadFailed
from homefire.wire.internal import HotLoadRequest, SnapshotLocation

PLACE = SnapshotLocation("local", "job-1", "run")
X, Y, BROKEN = (HotLoadRequest(identity=i, location=PLACE) for i in ("x", "y", "broken"))


@dataclass
class Weights:
    """Serves what was loaded last."""

    serving: HotLoadRequest = X
    loads: list[str | None] = field(default_factory=list)

    def is_serving(self, wanted: HotLoadRequest) -> bool:
        return wanted == self.serving

    async def load(self, wanted: HotLoadRequest) -> None:
        self.loads.append(wanted.identity)
        await asyncio.sleep(0)
        if wanted == BROKEN:
            raise HotLoadFailed("broken")
        self.serving = wanted


class Bench:
    """Requests that stay inside until they are let out."""

    def __init__(self) -> None:
        self.weights = Weights()
        self.turns = WeightTurns(self.weights)
        self.inside: list[str] = []
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self._out: dict[str, asyncio.Event] = {}

    def come(self, name: str, wanted: HotLoadRequest) -> None:
        self._out[name] = asyncio.Event()
        self.tasks[name] = asyncio.create_task(self._stay(name, wanted))

    async def _stay(self, name: str, wanted: HotLoadRequest) -> None:
        async with self.turns.turn(wanted):
            assert self.weights.is_serving(wanted)
            self.inside.append(name)
            await self._out[name].wait()
            assert self.weights.is_serving(wanted)
            self.inside.remove(name)

    def go(self, *names: str) -> None:
        for name in names:
            self._out[name].set()

    async def settle(self) -> list[str]:
        for _ in range(20):
            await asyncio.sleep(0)
        return sorted(self.inside)


async def test_requests_for_what_serves_come_in_at_once() -> None:
    bench = Bench()
    for name in ("a", "b"):
        bench.come(name, X)
    assert await bench.settle() == ["a", "b"]
    assert bench.weights.loads == []


async def test_a_swap_waits_for_those_inside_and_then_lets_in_all_that_wait_for_it() -> None:
    bench = Bench()
    bench.come("x1", X)
    await bench.settle()
    for name in ("y1", "y2"):
        bench.come(name, Y)
    assert await bench.settle() == ["x1"]
    bench.come("y3", Y)
    bench.go("x1")
    assert await bench.settle() == ["y1", "y2", "y3"]
    assert bench.weights.loads == ["y"]


async def test_who_comes_for_what_serves_while_others_wait_waits_for_the_next_turn() -> None:
    bench = Bench()
    bench.come("x1", X)
    await bench.settle()
    bench.come("y1", Y)
    await bench.settle()
    bench.come("x2", X)
    assert await bench.settle() == ["x1"]
    bench.go("x1")
    assert await bench.settle() == ["y1"]
    bench.go("y1")
    assert await bench.settle() == ["x2"]
    assert bench.weights.loads == ["y", "x"]


async def test_two_alternating_clients_cost_a_swap_per_turn_and_not_per_request() -> None:
    bench = Bench()
    for i in range(20):
        bench.come(f"{i}", (X, Y)[i % 2])
    while (inside := await bench.settle()) != []:
        bench.go(*inside)
    assert len(bench.weights.loads) <= 2
    assert all(task.done() for task in bench.tasks.values())


async def test_weights_that_cannot_be_loaded_fail_their_own_requests_only() -> None:
    bench = Bench()
    bench.come("b1", BROKEN)
    bench.come("b2", BROKEN)
    bench.come("y1", Y)
    assert await bench.settle() == ["y1"]
    for name in ("b1", "b2"):
        with pytest.raises(HotLoadFailed):
            await bench.tasks[name]


async def test_who_gives_up_waiting_is_not_counted_inside() -> None:
    bench = Bench()
    bench.come("x1", X)
    await bench.settle()
    bench.come("y1", Y)
    await bench.settle()
    bench.tasks["y1"].cancel()
    await bench.settle()
    bench.come("x2", X)
    assert await bench.settle() == ["x1", "x2"]
    bench.go("x1")
    bench.go("x2")
    await bench.settle()
    bench.come("y2", Y)
    assert await bench.settle() == ["y2"]
    assert bench.weights.loads == ["y"]


async def test_who_is_let_in_and_cancelled_at_the_same_moment_leaves_again() -> None:
    bench = Bench()
    bench.come("y1", Y)
    task = bench.tasks["y1"]
    while not bench.weights.is_serving(Y):
        await asyncio.sleep(0)
    task.cancel()
    bench.come("x1", X)
    assert await bench.settle() == ["x1"]
    assert task.cancelled()
