"""Forward passes whose graphs are kept for the backward that may follow.

A custom loss comes as a forward, then a forward_backward of the same rows with the loss's derivative
as weights. Keeping the forward's graph between the two saves running it again. Kept graphs of all
slots share one budget, the oldest go first, and none outlives the limit: a pass that finds its graph
gone runs the same forward again, and ends with the same bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

from homefire.foundation.clock import Clock
from homefire.trainer.engine.batch import Batch
from homefire.trainer.engine.network import Float32, PackedTargets, PassGraph, TrainableWeights
from homefire.wire.engine import ExecutionPlan
from homefire.wire.graphs import HeldGraphs

DEFAULT_SHARE = 8
"""Without a budget of the job's own, kept graphs take one part in so many of the device's memory."""


@dataclass(frozen=True)
class PassKey:
    """Two passes with one key lead to the same logprobs, unless the slot's weights moved between."""

    slot: str
    digest: str

    @classmethod
    def of(cls, slot: str, batch: Batch, plan: ExecutionPlan) -> PassKey:
        """Over rows, targets and cut; what a loss reads beside them changes no logprob."""
        digest = hashlib.sha256()
        digest.update(repr((batch.targets.shape, plan.micro_batches, plan.threads)).encode())
        for array in (batch.tokens, batch.lengths, batch.targets):
            digest.update(array.astype("<i8", order="C").tobytes())
        return cls(slot, digest.hexdigest())


@dataclass(eq=False)
class HeldPass:
    """The graphs of one pass, a micro-batch each, in the order of the plan."""

    key: PassKey
    graphs: list[PassGraph] = field(default_factory=list[PassGraph])
    held_at: float = 0.0

    @property
    def size_bytes(self) -> int:
        return sum(graph.size_bytes for graph in self.graphs)

    @property
    def is_intact(self) -> bool:
        return all(graph.is_intact for graph in self.graphs)

    def next(self) -> PassGraph:
        """The graph of the next micro-batch, which is the caller's now."""
        return self.graphs.pop(0)

    def release(self) -> None:
        for graph in self.graphs:
            graph.release()


class HeldPasses:
    """One engine's, oldest first. `available_bytes` says what the device has free."""

    def __init__(
        self,
        *,
        budget_bytes: int,
        limit_s: float,
        clock: Clock,
        available_bytes: Callable[[], int | None],
    ) -> None:
        self.budget_bytes = budget_bytes
        self._limit_s = limit_s
        self._clock = clock
        self._available_bytes = available_bytes
        self._passes: list[HeldPass] = []

    @property
    def held(self) -> HeldGraphs:
        self._keep_only(lambda each: each.is_intact)
        return HeldGraphs(len(self._passes), self._size_bytes)

    def begin(self, key: PassKey, num_tokens: int) -> KeptForward:
        """A pass that is about to run, `num_tokens` long."""
        return KeptForward(self, HeldPass(key), num_tokens)

    def take(self, key: PassKey) -> HeldPass | None:
        """The oldest pass of that key, which is the caller's now; None when there is none any more."""
        self.free_expired()
        for index, each in enumerate(self._passes):
            if each.key == key and each.is_intact:
                return self._passes.pop(index)
        return None

    def free_slot(self, slot: str) -> None:
        """Its weights change, or its gradient is another's from now on."""
        self._keep_only(lambda each: each.key.slot != slot)

    def free_all(self) -> None:
        self._keep_only(lambda _: False)

    def free_expired(self) -> float | None:
        """Seconds until the next pass expires; None while there is none."""
        now = self._clock.monotonic()
        self._keep_only(lambda each: each.is_intact and now - each.held_at < self._limit_s)
        return self._passes[0].held_at + self._limit_s - now if self._passes else None

    def make_way(self) -> None:
        """Before work that needs memory: what is kept never exceeds what is free beside it."""
        self.free_expired()
        while self._passes:
            available = self._available_bytes()
            if available is None or self._size_bytes <= available:
                return
            self._free_oldest()

    def make_room(self, size_bytes: int) -> bool:
        """Whether so much fits into the budget, now that the oldest went as far as needed."""
        if size_bytes > self.budget_bytes:
            return False
        while self._size_bytes + size_bytes > self.budget_bytes:
            self._free_oldest()
        return True

    def hold(self, held: HeldPass) -> None:
        held.held_at = self._clock.monotonic()
        self._passes.append(held)

    @property
    def _size_bytes(self) -> int:
        return sum(each.size_bytes for each in self._passes)

    def _free_oldest(self) -> None:
        self._passes.pop(0).release()

    def _keep_only(self, wanted: Callable[[HeldPass], bool]) -> None:
        kept = [each for each in self._passes if wanted(each)]
        for each in self._passes:
            if each not in kept:
                each.release()
        self._passes = kept


class KeptForward:
    """A forward whose graphs are kept while they fit; the rest of it then runs without."""

    def __init__(self, passes: HeldPasses, draft: HeldPass, num_tokens: int) -> None:
        self._passes = passes
        self._draft: HeldPass | None = draft
        self._num_tokens = num_tokens
        self._num_run = 0

    def logprobs(self, trained: TrainableWeights, batch: PackedTargets) -> Float32:
        """Of the next micro-batch."""
        if self._draft is None:
            return trained.logprobs(batch)
        graph = trained.graph(batch)
        logprobs = graph.logprobs
        self._draft.graphs.append(graph)
        self._num_run += len(batch.tokens)
        expected = self._draft.size_bytes * self._num_tokens // self._num_run
        if not self._passes.make_room(expected):
            self._draft.release()
            self._draft = None
        return logprobs

    def finish(self) -> bool:
        """Whether the whole pass is held now."""
        if self._draft is None:
            return False
        self._passes.hold(self._draft)
        return True


def budget_of(asked_bytes: int | None, total_bytes: int) -> int:
    return total_bytes // DEFAULT_SHARE if asked_bytes is None else asked_bytes
