from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from homefire.inference.engine.continuous import ContinuousEngine, QueueLimits
from homefire.inference.engine.fake import BigramNetwork
from homefire.inference.engine.protocol import Failed, Load, SequenceRequest
from homefire.wire.errors import EngineFailed, Overloaded, Unavailable
from unit.inference.canaries import GREEDY, canary_set
from unit.inference.scheduler_bench import Waiting, deliver, tokens_of

TIMEOUT_S = 20


class Held(BigramNetwork):
    """Decodes only when it is let."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, max_context_length=1 << 20)
        self.let = threading.Event()
        self.entered = threading.Event()

    def decode(self, tokens: Any, plan: Any, uniforms: Any, adapters: Any) -> Any:
        self.entered.set()
        assert self.let.wait(TIMEOUT_S)
        return super().decode(tokens, plan, uniforms, adapters)


class Broken(BigramNetwork):
    def prefill(self, rows: Any, plan: Any, uniforms: Any) -> Any:
        if rows[0].tokens == (13,):
            raise RuntimeError("a poisoned prompt")
        return super().prefill(rows, plan, uniforms)


MakeEngine = Callable[..., ContinuousEngine]


@pytest.fixture
def make_engine(tiny_directory: Path) -> Iterator[MakeEngine]:
    engines: list[ContinuousEngine] = []

    def make(network: Any = None, **options: Any) -> ContinuousEngine:
        network = network or BigramNetwork(tiny_directory, max_context_length=1 << 20)
        engine = ContinuousEngine(network, network.base_weights(), publish=deliver, **options)
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()


def request(*prompt: int, new: int = 4) -> SequenceRequest:
    return SequenceRequest(prompt or (1, 2), new, sampling=GREEDY)


def test_generations_from_many_threads_all_end(make_engine: MakeEngine) -> None:
    engine = make_engine()
    listeners = [Waiting() for _ in range(40)]
    threads = [
        threading.Thread(target=engine.submit, args=([request(i, new=1 + i % 5)], listener))
        for i, listener in enumerate(listeners)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(listener.over.wait(TIMEOUT_S) for listener in listeners)
    assert [len(tokens_of(listener)) for listener in listeners] == [1 + i % 5 for i in range(40)]


def test_too_many_waiting_requests_are_shed(make_engine: MakeEngine, tiny_directory: Path) -> None:
    network = Held(tiny_directory)
    engine = make_engine(network, queue=QueueLimits(requests=3))
    running = Waiting()
    engine.submit([request(new=3)], running)
    assert network.entered.wait(TIMEOUT_S)
    waiting = [Waiting() for _ in range(3)]
    for listener in waiting:
        engine.submit([request()], listener)
    with pytest.raises(Overloaded, match="3 requests are waiting"):
        engine.submit([request()], Waiting())
    network.let.set()
    assert all(listener.over.wait(TIMEOUT_S) for listener in (running, *waiting))


def test_prompts_that_wait_have_so_many_tokens_at_most(
    make_engine: MakeEngine, tiny_directory: Path
) -> None:
    network = Held(tiny_directory)
    engine = make_engine(network, queue=QueueLimits(prompt_tokens=10))
    running, group, too_long = Waiting(), Waiting(4), Waiting()
    engine.submit([request(new=3)], running)
    assert network.entered.wait(TIMEOUT_S)
    shared = request(*[1] * 8)
    engine.submit([shared] * 4, group)
    assert engine.load().queued_tokens == 8
    with pytest.raises(Overloaded, match="8 prompt tokens are waiting, with 3 more"):
        engine.submit([request(1, 1, 1)], Waiting())
    network.let.set()
    assert running.over.wait(TIMEOUT_S)
    assert group.over.wait(TIMEOUT_S)
    engine.submit([request(*[1] * 11)], too_long)
    assert too_long.over.wait(TIMEOUT_S)
    assert engine.load() == Load(running=0, queued=0)


def test_a_cancelled_generation_leaves_the_engine(
    make_engine: MakeEngine, tiny_directory: Path
) -> None:
    network = Held(tiny_directory)
    engine = make_engine(network)
    ticket = engine.submit([request(new=1 << 19)], Waiting())
    assert network.entered.wait(TIMEOUT_S)
    engine.cancel(ticket)
    other = Waiting()
    engine.submit([request(new=1)], other)
    network.let.set()
    assert other.over.wait(TIMEOUT_S)
    assert engine.load() == Load(running=0, queued=0)


def test_a_swap_resolves_its_future_and_shows_in_what_is_served(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.swap_weights(canary_set(6), drain_timeout_s=1.0).result(TIMEOUT_S)
    assert engine.serving() == canary_set(6).served
    listener = Waiting()
    engine.submit([request(new=2)], listener)
    assert listener.over.wait(TIMEOUT_S)
    assert tokens_of(listener) == [6, 6]


def test_a_poisoned_request_fails_and_the_engine_goes_on(
    make_engine: MakeEngine, tiny_directory: Path
) -> None:
    engine = make_engine(Broken(tiny_directory, max_context_length=100))
    poisoned, healthy = Waiting(), Waiting()
    engine.submit([request(13)], poisoned)
    assert poisoned.over.wait(TIMEOUT_S)
    assert "a poisoned prompt" in str(poisoned.of(Failed)[0].error)
    engine.submit([request(14)], healthy)
    assert healthy.over.wait(TIMEOUT_S)
    assert len(tokens_of(healthy)) == 4


def test_closing_fails_what_is_left_and_refuses_what_comes(
    make_engine: MakeEngine, tiny_directory: Path
) -> None:
    network = Held(tiny_directory)
    engine = make_engine(network)
    listener = Waiting()
    engine.submit([request(new=1 << 19)], listener)
    assert network.entered.wait(TIMEOUT_S)
    network.let.set()
    engine.close()
    assert isinstance(listener.of(Failed)[0].error, Unavailable)
    with pytest.raises(Unavailable):
        engine.submit([request()], Waiting())


def lose(weights: Any) -> str:
    raise RuntimeError("the memory is gone")


def garble(weights: Any) -> str:
    return "the digest of something else"


@pytest.mark.parametrize("install", [lose, garble])
def test_an_engine_that_lost_its_weights_serves_nothing_more(
    make_engine: MakeEngine, tiny_directory: Path, install: Any
) -> None:
    network = BigramNetwork(tiny_directory, max_context_length=100)
    engine = make_engine(network)
    engine.swap_weights(canary_set(6), drain_timeout_s=1.0).result(TIMEOUT_S)
    network.install = install
    swap = engine.swap_weights(canary_set(7), drain_timeout_s=1.0)
    assert isinstance(swap.exception(TIMEOUT_S), EngineFailed)
    with pytest.raises(EngineFailed, match="broken"):
        engine.submit([request()], Waiting())
