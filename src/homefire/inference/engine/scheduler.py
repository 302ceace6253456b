"""Continuous batching, one step at a time: admit, prefill, decode, retire; swap weights between steps.

Pure of threads and of time: the caller owns both. `step()` returns what is to be told to whom.

    waiting ──admit──▶ prefilling ──▶ running (slot = place in the list) ──finish──▶ gone;
                                                           the last slot fills the hole
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Items
from concurrent.futures import Future
from dataclasses import dataclass, field

from homefire.foundation.clock import Clock
from homefire.inference.engine.adapter_loads import AdapterLoads
from homefire.inference.engine.adapter_table import AdapterLimits
from homefire.inference.engine.network import Adapter, Network, PromptScore
from homefire.inference.engine.prefills import Admission, PrefillPass, Prefills
from homefire.inference.engine.protocol import (
    Failed,
    Listener,
    Prefilled,
    SequenceRequest,
    ServedWeights,
    Started,
    Stragglers,
    Swapped,
    Update,
    WeightSet,
)
from homefire.inference.engine.row_plans import adjustments_for, plan_of, uniforms_of
from homefire.inference.engine.sampling_plan import SamplingPlan
from homefire.inference.engine.sequence import Generation, Sequence
from homefire.inference.engine.weight_swaps import PendingSwap, WeightSwaps
from homefire.wire.completions import FinishReason
from homefire.wire.errors import FailedPrecondition, HomefireError, WeightsMismatch


@dataclass(frozen=True)
class SchedulerLimits:
    max_running: int = 64
    """Sequences decoded together."""
    prefill_tokens: int = 512
    """Prompt tokens of one prefill pass: running sequences wait for no more of them between two tokens."""
    delivery_interval_s: float = 0.05
    """Tokens are handed over together, if none has to wait longer than this: one at a time, 64 streams
    at 2 ms a step would be 32,000 chunks a second."""
    adapters: AdapterLimits = field(default_factory=AdapterLimits)


_LOOK_AHEAD = 64
"""Sequences that may be passed over in one admission."""


class Scheduler:
    """Used by one thread. `serving` may be read by others."""

    def __init__(
        self, network: Network, weights: WeightSet, *, limits: SchedulerLimits, clock: Clock
    ) -> None:
        self._network = network
        self._limits = limits
        self._clock = clock
        self._swaps = WeightSwaps(network, weights, clock)
        self.adapters = AdapterLoads(network, limits.adapters)
        self._waiting: deque[Sequence] = deque()
        """Of generations that have not begun."""
        self._begun: deque[Sequence] = deque()
        """Not admitted yet, of generations that have begun: they end on the weights they began on."""
        self._prefills = Prefills(network, budget=limits.prefill_tokens)
        self._num_queued = self._num_queued_tokens = 0
        self._running: list[Sequence] = []
        self._plan: SamplingPlan | None = None
        self._row_adapters: tuple[Adapter, ...] = ()
        """As the plan: of the running batch, the same object until the batch changes."""
        self._random = random.Random()
        self._step_s = 0.0
        self._deliveries: list[tuple[Listener, Update]] = []

    @property
    def serving(self) -> WeightSet:
        return self._swaps.serving

    @property
    def num_running(self) -> int:
        """Sequences that hold a slot, or will as soon as their prompt is computed."""
        return len(self._running) + len(self._prefills.sequences)

    @property
    def num_queued(self) -> int:
        """Generations of which no sequence was admitted yet."""
        return self._num_queued

    @property
    def num_queued_tokens(self) -> int:
        """Of their prompts."""
        return self._num_queued_tokens

    @property
    def is_idle(self) -> bool:
        has_sequences = self._waiting or self._begun or self.num_running
        return not (has_sequences or self._swaps.pending)

    def submit(self, generation: Generation, sequences: Items[SequenceRequest]) -> None:
        if generation.has_ended:
            return
        for index, request in enumerate(sequences):
            numbers = self._random if request.seed is None else random.Random(request.seed)
            self._waiting.append(Sequence(generation, index, request, numbers))
        self._count_queued(generation, 1)

    def cancel(self, generation: Generation) -> None:
        """Frees its slots now; its listener hears no more."""
        self._end([generation])
        self._prefills.cancel(generation)
        self._retire(lambda sequence: sequence.generation is generation)

    def begin_swap(
        self,
        weights: WeightSet,
        *,
        drain_timeout_s: float,
        done: Future[Swapped],
        stragglers: Stragglers = Stragglers.FAIL_SWAP,
        reset_prompt_cache: bool = True,
    ) -> None:
        """`done` hears how it went; from now on it cannot be cancelled."""
        self._swaps.begin(
            weights,
            drain_timeout_s=drain_timeout_s,
            stragglers=stragglers,
            reset_prompt_cache=reset_prompt_cache,
            done=done,
        )

    def step(self) -> list[tuple[Listener, Update]]:
        """One pass over prompts, then one token for every running sequence."""
        self.adapters.advance(self._adapters_in_use)
        if self._swaps.pending is not None:
            self._advance_swap(self._swaps.pending)
        self._admit()
        if (prompts := self._prefills.next_pass(len(self._running))) is not None:
            self._prefill(prompts)
        if self._running:
            began_at = self._clock.monotonic()
            self._decode()
            self._step_s = self._clock.monotonic() - began_at
        return self._take_deliveries()

    def recover(self, error: HomefireError) -> list[tuple[Listener, Update]]:
        """After a step broke: ends what was in the batch and puts back the weights that a broken swap
        left half changed. Whatever waits goes on waiting."""
        broken = (*self._running, *self._prefills.sequences)
        self._fail((sequence.generation for sequence in broken), error)
        self._running.clear()
        self._prefills.forget()
        self._plan = None
        self._swaps.recover(error)
        return self._take_deliveries()

    def fail_all(self, error: HomefireError) -> list[tuple[Listener, Update]]:
        """Ends every generation, load and swap. Nothing runs afterwards."""
        self.adapters.fail_all(error)
        self._fail((sequence.generation for sequence in self._all_sequences()), error)
        self._running.clear()
        self._prefills.forget()
        self._swaps.fail(error)
        return self._take_deliveries()

    # admission ------------------------------------------------------------------------------

    def _admit(self) -> None:
        """The next waiting sequences that fit the slots and the next pass over prompts."""
        now, passed_over = self._clock.monotonic(), list[Sequence]()
        while self.num_running < self._limits.max_running and len(passed_over) < _LOOK_AHEAD:
            queue = self._next_queue()
            if queue is None:
                break
            generation = queue[0].generation
            if (refusal := self._refusal_of(generation)) is not None:
                self._fail([generation], refusal)
                continue
            admission = self._prefills.admit(queue[0], *self._weights_of(generation))
            if admission is Admission.FULL:
                break
            sequence = queue.popleft()
            if admission is Admission.LATER:
                passed_over.append(sequence)
            else:
                self._begin(sequence, now)
        self._put_back(passed_over)

    def _next_queue(self) -> deque[Sequence] | None:
        """Whose head is next. While the gate is closed no generation begins."""
        for queue in (self._begun, self._waiting):
            while queue and queue[0].generation.has_ended:
                queue.popleft()
        if self._begun:
            return self._begun
        return self._waiting if self._waiting and not self._swaps.gate.is_closed else None

    def _put_back(self, passed_over: list[Sequence]) -> None:
        for sequence in reversed(passed_over):
            has_begun = sequence.generation.weights is not None
            (self._begun if has_begun else self._waiting).appendleft(sequence)

    def _begin(self, sequence: Sequence, now: float) -> None:
        sequence.delivered_at = now
        generation = sequence.generation
        if generation.weights is not None:
            return
        self._start(generation, now)
        while self._waiting and self._waiting[0].generation is generation:
            self._begun.append(self._waiting.popleft())

    def _weights_of(self, generation: Generation) -> tuple[ServedWeights, Adapter]:
        """Fixed, once it has begun."""
        if generation.weights is not None:
            return generation.weights, generation.adapter
        serving, wanted = self.serving.served, generation.wanted
        weights = wanted or serving
        return weights, None if weights == serving else wanted

    def _refusal_of(self, generation: Generation) -> HomefireError | None:
        """Why the weights that it wants cannot serve it."""
        wanted, serving = generation.wanted, self.serving.served
        if generation.weights is not None or wanted is None or wanted == serving:
            return None
        if serving.identity is None and wanted in self.adapters.table:
            return self.adapters.refusal_of(wanted)
        return self._not_served(wanted)

    def _not_served(self, wanted: ServedWeights) -> WeightsMismatch:
        serving = self.serving.served.name
        return WeightsMismatch(
            f"{wanted.name!r} was asked for, {serving!r} is served",
            hint="hot load it first; an adapter must be held, and serves beside the base model only",
            current=serving,
        )

    def _start(self, generation: Generation, now: float) -> None:
        generation.weights, generation.adapter = self._weights_of(generation)
        self._count_queued(generation, -1)
        swap_wait_s = self._swaps.gate.closed_between(generation.arrived_at, now)
        queue_s = max(0.0, now - generation.arrived_at - swap_wait_s)
        generation.started = Started(generation.weights, queue_s, swap_wait_s, self.num_running)

    # compute --------------------------------------------------------------------------------

    def _prefill(self, prompts: PrefillPass) -> None:
        ready = list(prompts.sequences)
        plan = plan_of(ready).adjusted(adjustments_for(ready))
        result = self._network.prefill(prompts.rows, plan, uniforms_of(ready))
        self._note_prefilled(prompts, result.scores)
        self._prefills.note_computed(prompts)
        self._running += ready
        for row, sequence in enumerate(ready):
            if sequence.request.max_new_tokens > 0:
                sequence.accept(result.draws, row)
            else:
                sequence.finish = FinishReason.LENGTH
        if ready:
            self._plan = None
            self._hand_over(ready)

    def _note_prefilled(self, prompts: PrefillPass, scores: Items[PromptScore]) -> None:
        now = self._clock.monotonic()
        for prefill, row, score in zip(prompts.prefills, prompts.rows, scores, strict=True):
            sequences = prefill.sequences if row.slots else []
            for sequence in sequences:
                is_first = sequence is prefill.sequences[0]
                wanted = score if sequence.request.scoring is not None else PromptScore()
                sequence.prefilled = Prefilled(
                    sequence.index,
                    now,
                    prefill.num_cached if is_first else len(row.tokens),
                    wanted.logprobs,
                    wanted.alternatives,
                    wanted.target_logprobs,
                    wanted.draws,
                )

    def _decode(self) -> None:
        if self._plan is None:
            self._plan = plan_of(self._running)
            self._row_adapters = tuple(s.generation.adapter for s in self._running)
        tokens = [sequence.last_token for sequence in self._running]
        uniforms = uniforms_of(self._running)
        plan = self._plan.adjusted(adjustments_for(self._running))
        draws = self._network.decode(tokens, plan, uniforms, self._row_adapters)
        for row, sequence in enumerate(self._running):
            sequence.accept(draws, row)
        self._hand_over(list(self._running))

    def _hand_over(self, sequences: list[Sequence]) -> None:
        """Tells what would have waited too long by the end of the next step, and what is at its end."""
        now = self._clock.monotonic()
        due = now + self._step_s - self._limits.delivery_interval_s
        self._tell([s for s in sequences if s.finish is not None or s.delivered_at <= due])
        if any(sequence.finish is not None for sequence in sequences):
            self._retire(lambda sequence: sequence.finish is not None)

    def _retire(self, has_ended: Callable[[Sequence], bool]) -> None:
        """Packs what goes on into the first slots; the last ones fill the holes."""
        ended = [has_ended(sequence) for sequence in self._running]
        for slot, sequence in enumerate(self._running):
            if ended[slot]:
                self._prefills.keep(sequence, slot)
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
        if not self.num_running and self._next_queue() is None:
            if self._swaps.install(swap, num_stragglers=0):
                self._forget_prompts(swap)
        elif self._clock.monotonic() < swap.deadline:
            return
        elif swap.stragglers is Stragglers.FAIL_SWAP:
            self._swaps.time_out(swap, self.num_running)
        else:
            self._swap_in_place(swap)

    def _swap_in_place(self, swap: PendingSwap) -> None:
        """Between two tokens of what runs. Tokens that were drawn before are told first, with the weights
        that drew them."""
        if self._adapters_in_use():
            refusal = FailedPrecondition("the base model cannot be replaced below running adapters")
            self._swaps.finish(swap, refusal)
            return
        self._tell(self._running)
        if self._swaps.install(swap, num_stragglers=self.num_running + len(self._begun)):
            self._carry_over()
            self._forget_prompts(swap)

    def _carry_over(self) -> None:
        """What has begun goes on under the new weights, but what insists on others. A prompt that is half
        computed begins again: blocks of two versions would be found by others."""
        served = self.serving.served
        self._begun.extendleft(reversed(self._prefills.take_back()))
        begun = {sequence.generation for sequence in (*self._running, *self._begun)}
        for generation in begun:
            if generation.wanted is not None:
                self._fail([generation], self._not_served(generation.wanted))
        self._retire(lambda sequence: sequence.generation.has_ended)
        for generation in begun:
            generation.carry_over(served)
        for sequence in self._running:
            sequence.is_mixed = True

    def _forget_prompts(self, swap: PendingSwap) -> None:
        if swap.reset_prompt_cache:
            self._prefills.forget_idle()

    def _adapters_in_use(self) -> frozenset[ServedWeights]:
        begun = (sequence.generation.adapter for sequence in self._all_sequences())
        return frozenset(adapter for adapter in begun if adapter is not None)

    def _all_sequences(self) -> Items[Sequence]:
        return (*self._running, *self._prefills.sequences, *self._begun, *self._waiting)

    # telling --------------------------------------------------------------------------------

    def _tell(self, sequences: Iterable[Sequence]) -> None:
        now = self._clock.monotonic()
        for sequence in sequences:
            listener = sequence.generation.listener
            self._deliveries += [(listener, update) for update in sequence.take(now)]

    def _fail(self, generations: Iterable[Generation], error: HomefireError) -> None:
        once = dict.fromkeys(generation for generation in generations if not generation.has_ended)
        self._end(once)
        self._deliveries += [(generation.listener, Failed(error)) for generation in once]

    def _end(self, generations: Iterable[Generation]) -> None:
        """Its sequences that wait are skipped from now on."""
        for generation in generations:
            if generation.weights is None and not generation.has_ended:
                self._count_queued(generation, -1)
            generation.has_ended = True

    def _count_queued(self, generation: Generation, change: int) -> None:
        self._num_queued += change
        self._num_queued_tokens += change * generation.num_prompt_tokens

    def _take_deliveries(self) -> list[tuple[Listener, Update]]:
        deliveries, self._deliveries = self._deliveries, []
        return deliveries
