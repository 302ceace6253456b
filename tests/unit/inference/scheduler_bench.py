"""A scheduler without threads, on a clock that moves when told."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from homefire.foundation.clock import ManualClock
from homefire.inference.engine.protocol import (
    Failed,
    Listener,
    Sampled,
    SequenceRequest,
    ServedWeights,
    Started,
    Ticket,
    Update,
    WeightSet,
)
from homefire.inference.engine.scheduler import Scheduler
from homefire.inference.engine.sequence import Generation


@dataclass
class Recorder(Listener):
    updates: list[Update] = field(default_factory=list)

    def receive(self, update: Update) -> None:
        self.updates.append(update)

    def of(self, kind: type[Any]) -> list[Any]:
        return [update for update in self.updates if isinstance(update, kind)]


class Waiting(Recorder):
    """Knows, in any thread, when its generation began and when it ended."""

    def __init__(self, num_sequences: int = 1) -> None:
        super().__init__()
        self._num_open = num_sequences
        self.ticket = Ticket()
        self.started = threading.Event()
        self.over = threading.Event()

    def receive(self, update: Update) -> None:
        super().receive(update)
        if isinstance(update, Started):
            self.started.set()
        elif isinstance(update, Failed):
            self.over.set()
        elif isinstance(update, Sampled) and update.finish is not None:
            self._num_open -= 1
            if self._num_open == 0:
                self.over.set()


@dataclass
class Bench:
    """A scheduler with its clock. `run` steps until nothing is left to do."""

    scheduler: Scheduler
    clock: ManualClock

    def submit(
        self, *sequences: SequenceRequest, weights: ServedWeights | None = None
    ) -> tuple[Generation, Recorder]:
        recorder = Recorder()
        generation = Generation(recorder, self.clock.monotonic(), wanted=weights)
        self.scheduler.submit(generation, sequences)
        return generation, recorder

    def load(self, weights: WeightSet) -> Future[None]:
        done: Future[None] = Future()
        self.scheduler.adapters.request(weights, done)
        self.step()
        return done

    def step(self, seconds: float = 0.0) -> None:
        self.clock.advance(seconds)
        deliver(self.scheduler.step())

    def run(self, seconds: float = 0.0) -> None:
        while not self.scheduler.is_idle:
            self.step(seconds)


def deliver(deliveries: Sequence[tuple[Listener, Update]]) -> None:
    for listener, update in deliveries:
        listener.receive(update)


def tokens_of(recorder: Recorder, index: int | None = None) -> list[int]:
    """All tokens sampled, or those of one sequence."""
    return [
        token
        for update in recorder.of(Sampled)
        if index is None or update.index == index
        for token in update.tokens
    ]
