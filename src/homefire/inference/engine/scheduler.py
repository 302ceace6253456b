"""Continuous batching, one step at a time: admit, prefill, decode, retire; swap weights between steps.

Pure of threads and of time: the caller owns both. `step()` returns what is to be told to whom.

    waiting ──admit──▶ running (slot = place in the list) ──finish──▶ gone; the last slot fills the hole
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Items
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from homefire.foundation.clock import Clock
from homefire.inference.engine.adapter_loads import AdapterLoads
from homefire.inference.engine.adapter_table import AdapterLimits
from homefire.inference.engine.network import Adapter, Network, PrefillRow, PromptScore
from homefire.inference.engine.prompt_rows import shared_rows
from homefire.inference.engine.protocol import (
    Failed,
    Listener,
    Prefilled,
    SequenceRequest,
    ServedWeights,
    Started,
    Swapped,
    Update,
    WeightSet,
)
from homefire.inference.engine.sampling_plan import SamplingPlan, Uniforms
from homefire.inference.engine.sequence import Generation, Sequence
from homefire.inference.engine.swap_gate import SwapGate
from homefire.wire.completions import FinishReason
from homefire.wire.errors import (
    DigestMismatch,
    EngineFailed,
    FailedPrecondition,
    HomefireError,
    HotLoadFailed,
    UserError,
    WeightsMismatch,
)


@dataclass(frozen=True)
class SchedulerLimits:
    max_running: int = 64
    """Sequences decoded together."""
    prefill_tokens: int = 2048
    """Prompt tokens of one prefill pass; a longer prompt goes alone."""
    delivery_interval_s: float = 0.05
    """Tokens are handed over together, if none has to wait longer than this: one at a time, 64 streams
    at 2 ms a step would be 32,000 chunks a second."""
    adapters: AdapterLimits = field(default_factory=AdapterLimits)


@dataclass
class PendingSwap:
    weights: WeightSet
    began_at: float
    deadline: float
    done: Future[Swapped]
    drained_at: float | None = None
    """From here on the weights in memory may be neither the old nor the new ones."""


class Scheduler:
    """Used by one thread. `serving` may be read by others."""

    def __init__(
        self, network: Network, weights: WeightSet, *, limits: SchedulerLimits, clock: Clock
    ) -> None:
        self._network = network
        self._limits = limits
        self._clock = clock
        self._serving = weights
        self.adapters = AdapterLoads(network, limits.adapters)
        self._waiting: deque[Sequence] = deque()
        self._num_queued = 0
        self._running: list[Sequence] = []
        self._plan: SamplingPlan | None = None
        self._row_adapters: tuple[Adapter, ...] = ()
        """As the plan: of the running batch, the same object until the batch changes."""
        self._gate = SwapGate()
        self._swap: PendingSwap | None = None
        self._random = random.Random()
        self._step_s = 0.0
        self._deliveries: list[tuple[Listener, Update]] = []

    @property
    def serving(self) -> WeightSet:
        return self._serving

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_queued(self) -> int:
        """Generations of which no sequence was admitted yet."""
        return self._num_queued

    @property
    def is_idle(self) -> bool:
        return not (self._waiting or self._running or self._swap)

    def submit(self, generation: Generation, sequences: Items[SequenceRequest]) -> None:
        if generation.has_ended:
            return
        for index, request in enumerate(sequences):
            numbers = self._random if request.seed is None else random.Random(request.seed)
            self._waiting.append(Sequence(generation, index, request, numbers))
        self._num_queued += 1

    def cancel(self, generation: Generation) -> None:
        """Frees its slots now; its listener hears no more."""
        self._end([generation])
        self._retire(lambda sequence: sequence.generation is generation)

    def begin_swap(
        self, weights: WeightSet, *, drain_timeout_s: float, done: Future[Swapped]
    ) -> None:
        """`done` hears how it went; from now on it cannot be cancelled."""
        if not done.set_running_or_notify_cancel():
            return
        if self._swap is not None:
            done.set_exception(FailedPrecondition("another swap of weights is under way"))
            return
        now = self._clock.monotonic()
        self._swap = PendingSwap(weights, now, now + drain_timeout_s, done)
        self._gate.close(now)

    def step(self) -> list[tuple[Listener, Update]]:
        """One prefill of what can be admitted, then one token for every running sequence."""
        self.adapters.advance(self._adapters_in_use)
        if self._swap is not None:
            self._advance_swap(self._swap)
        if admitted := self._admit():
            self._prefill(admitted)
        if self._running:
            began_at = self._clock.monotonic()
            self._decode()
            self._step_s = self._clock.monotonic() - began_at
        return self._take_deliveries()

    def recover(self, error: HomefireError) -> list[tuple[Listener, Update]]:
        """After a step broke: ends what was in the batch and puts back the weights that a broken swap
        left half changed. Whatever waits goes on waiting."""
        self._fail((sequence.generation for sequence in self._running), error)
        self._running.clear()
        self._plan = None
        if self._swap is not None and self._swap.drained_at is not None:
            self._restore()
            self._finish_swap(self._swap, error)
        return self._take_deliveries()

    def fail_all(self, error: HomefireError) -> list[tuple[Listener, Update]]:
        """Ends every generation, load and swap. Nothing runs afterwards."""
        self.adapters.fail_all(error)
        self._fail((s.generation for s in (*self._running, *self._waiting)), error)
        self._running.clear()
        if self._swap is not None:
            self._finish_swap(self._swap, error)
        return self._take_deliveries()

    # admission ------------------------------------------------------------------------------

    def _admit(self) -> list[Sequence]:
        """The next waiting sequences that fit the slots and the prefill budget."""
        admitted: list[Sequence] = []
        tokens, now = 0, self._clock.monotonic()
        while len(self._running) < self._limits.max_running:
            sequence = self._next_admissible()
            if sequence is None:
                break
            if not self._has_weights_for(sequence.generation):
                self._fail([sequence.generation], self._not_served(sequence.generation))
                continue
            tokens += len(sequence.request.prompt)
            if admitted and tokens > self._limits.prefill_tokens:
                break
            self._running.append(self._waiting.popleft())
            sequence.delivered_at = now
            admitted.append(sequence)
            if sequence.generation.weights is None:
                self._start(sequence.generation, now)
        return admitted

    def _next_admissible(self) -> Sequence | None:
        """The head of the queue. While the gate is closed only one whose generation has begun: it
        must end on the weights it began on, and its sequences stand together at the head."""
        while self._waiting and self._waiting[0].generation.has_ended:
            self._waiting.popleft()
        if not self._waiting:
            return None
        head = self._waiting[0]
        return None if self._gate.is_closed and head.generation.weights is None else head

    def _has_weights_for(self, generation: Generation) -> bool:
        wanted, serving = generation.wanted, self._serving.served
        if generation.weights is not None or wanted is None or wanted == serving:
            return True
        return serving.identity is None and wanted in self.adapters.table

    def _not_served(self, generation: Generation) -> WeightsMismatch:
        wanted = generation.wanted or self._serving.served
        return WeightsMismatch(
            f"{wanted.name!r} was asked for, {self._serving.served.name!r} is served",
            hint="an adapter must be held, and only the base model serves with adapters",
        )

    def _start(self, generation: Generation, now: float) -> None:
        serving, wanted = self._serving.served, generation.wanted
        generation.weights = wanted or serving
        generation.adapter = None if generation.weights == serving else wanted
        self._num_queued -= 1
        swap_wait_s = self._gate.closed_between(generation.arrived_at, now)
        queue_s = max(0.0, now - generation.arrived_at - swap_wait_s)
        num_running = len(self._running)
        generation.started = Started(generation.weights, queue_s, swap_wait_s, num_running)

    # compute --------------------------------------------------------------------------------

    def _prefill(self, admitted: list[Sequence]) -> None:
        first_slot = len(self._running) - len(admitted)
        rows = shared_rows(admitted, first_slot)
        result = self._network.prefill(rows, _plan_for(admitted), _uniforms(admitted))
        self._note_prefilled(rows, result.scores)
        for row, sequence in enumerate(admitted):
            if sequence.request.max_new_tokens > 0:
                sequence.accept(result.draws, row)
            else:
                sequence.finish = FinishReason.LENGTH
        self._plan = None
        self._hand_over(admitted)

    def _note_prefilled(self, rows: Items[PrefillRow], scores: Items[PromptScore]) -> None:
        now = self._clock.monotonic()
        for row, score in zip(rows, scores, strict=True):
            for slot in row.slots:
                sequence = self._running[slot]
                num_cached = 0 if slot == row.slots[0] else len(row.tokens)
                wanted = score if sequence.request.scoring is not None else PromptScore()
                sequence.prefilled = Prefilled(
                    sequence.index,
                    now,
                    num_cached,
                    wanted.logprobs,
                    wanted.alternatives,
                    wanted.target_logprobs,
                    wanted.draws,
                )

    def _decode(self) -> None:
        if self._plan is None:
            self._plan = _plan_for(self._running)
            self._row_adapters = tuple(s.generation.adapter for s in self._running)
        tokens = [sequence.last_token for sequence in self._running]
        uniforms = _uniforms(self._running)
        draws = self._network.decode(tokens, self._plan, uniforms, self._row_adapters)
        for row, sequence in enumerate(self._running):
            sequence.accept(draws, row)
        self._hand_over(list(self._running))

    def _hand_over(self, sequences: list[Sequence]) -> None:
        """Tells what would have waited too long by the end of the next step, and what is at its end."""
        now = self._clock.monotonic()
        due = now + self._step_s - self._limits.delivery_interval_s
        for sequence in sequences:
            if sequence.finish is not None or sequence.delivered_at <= due:
                listener = sequence.generation.listener
                self._deliveries += [(listener, update) for update in sequence.take(now)]
        if any(sequence.finish is not None for sequence in sequences):
            self._retire(lambda sequence: sequence.finish is not None)

    def _retire(self, has_ended: Callable[[Sequence], bool]) -> None:
        """Packs what goes on into the first slots; the last ones fill the holes."""
        ended = [has_ended(sequence) for sequence in self._running]
        count = ended.count(False)
        holes = (slot for slot in range(count) if ended[slot])
        movers = (slot for slot in range(count, len(ended)) if not ended[slot])
        for hole, mover in zip(holes, movers, strict=True):
            self._network.move(source=mover, destination=hole)
            self._running[hole] = self._running[mover]
        del self._running[count:]
        self._plan = None

    # weights --------------------------------------------------------------------------------

    def _advance_swap(self, swap: PendingSwap) -> None:
        now = self._clock.monotonic()
        if not self._running and self._next_admissible() is None:
            self._apply(swap, now)
        elif now >= swap.deadline:
            self._finish_swap(swap, self._drain_timeout(swap, now))

    def _drain_timeout(self, swap: PendingSwap, now: float) -> HotLoadFailed:
        return HotLoadFailed(
            f"{len(self._running)} sequences still ran after {now - swap.began_at:.0f} s,"
            f" so {swap.weights.served.name!r} was not loaded",
            hint="load it again, ask for fewer tokens, or raise drain_timeout_s",
        )

    def _apply(self, swap: PendingSwap, now: float) -> None:
        swap.drained_at = now
        try:
            digest = self._network.install(swap.weights)
        except UserError as refusal:  # found before anything was changed
            self._finish_swap(swap, refusal)
            return
        if digest != swap.weights.served.digest:
            self._restore()
            self._finish_swap(swap, _mismatch(swap.weights, digest))
            return
        self._serving = swap.weights
        apply_ms = 1000 * (self._clock.monotonic() - now)
        self._finish_swap(swap, Swapped(1000 * (now - swap.began_at), apply_ms))

    def _restore(self) -> None:
        """The base model is not kept beside itself in memory, so it is read from disk again. When this
        fails nothing may be served any more."""
        served = self._serving.served
        old = self._network.base_weights() if served.identity is None else self._serving
        if self._network.install(old) != served.digest:
            raise EngineFailed(
                f"the weights of {served.name!r} could not be restored after a failed swap",
                hint="restart the replica",
            )

    def _adapters_in_use(self) -> frozenset[ServedWeights]:
        begun = (sequence.generation.adapter for sequence in (*self._running, *self._waiting))
        return frozenset(adapter for adapter in begun if adapter is not None)

    def _finish_swap(self, swap: PendingSwap, result: Swapped | HomefireError) -> None:
        self._swap = None
        self._gate.open(self._clock.monotonic())
        if isinstance(result, Swapped):
            swap.done.set_result(result)
        else:
            swap.done.set_exception(result)

    # telling --------------------------------------------------------------------------------

    def _fail(self, generations: Iterable[Generation], error: HomefireError) -> None:
        once = dict.fromkeys(generation for generation in generations if not generation.has_ended)
        self._end(once)
        self._deliveries += [(generation.listener, Failed(error)) for generation in once]

    def _end(self, generations: Iterable[Generation]) -> None:
        """Its sequences that wait are skipped from now on."""
        for generation in generations:
            if generation.weights is None and not generation.has_ended:
                self._num_queued -= 1
            generation.has_ended = True

    def _take_deliveries(self) -> list[tuple[Listener, Update]]:
        deliveries, self._deliveries = self._deliveries, []
        return deliveries


def _mismatch(weights: WeightSet, found: str) -> DigestMismatch:
    return DigestMismatch(
        f"{weights.served.name!r} should have digest {weights.served.digest[:16]}…,"
        f" the weights in memory had {found[:16]}…",
        hint="the old weights were put back; save the snapshot again",
    )


def _plan_for(sequences: list[Sequence]) -> SamplingPlan:
    return SamplingPlan.of(
        [sequence.request.sampling for sequence in sequences],
        [sequence.request.num_alternatives for sequence in sequences],
    )


def _uniforms(sequences: list[Sequence]) -> Uniforms:
    return np.array([sequence.random.random() for sequence in sequences])
