"""A scheduler without threads, on a clock that moves when told."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from homefire.foundation.clock import ManualClock
from homefire.inference.engine.protocol import (
    Listener,
    Sampled,
    SequenceRequest,
    ServedWeights,
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


@dataclass
class Bench:
    """A scheduler with its clock. `run` steps until nothing is left to do."""

    scheduler: Scheduler
    clock: ManualClock

    def submit(
        self, *sequences: SequenceRequest, weights: ServedWeights | None = None
    ) -> tuple[Generation, Recorder]:
        recorder = Recorder()
        generation = Generation(recorder, self.clock.monotonic(), weights)
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
