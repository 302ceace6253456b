"""Prompts on their way into the cache: what of each is computed, in which pass.

Equal prompts under the same weights are computed once, and what an earlier sequence left in the prefix cache
is not computed at all. A pass has a budget of tokens, so that running sequences wait for no more than
that: a prompt beyond it goes in chunks, one such prompt at a time, and leaves half of each pass to the
short ones behind it.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass
from enum import StrEnum

from homefire.inference.engine.network import Adapter, Network, PrefillRow
from homefire.inference.engine.prefix_cache import Lease, PrefixCache
from homefire.inference.engine.protocol import PromptScoring, ServedWeights
from homefire.inference.engine.sequence import Generation, Sequence


class Admission(StrEnum):
    BEGUN = "begun"
    """Its prompt is computed in the next pass, or from there on."""
    LATER = "later"
    """Another prompt must be further first; those behind it need not wait."""
    FULL = "full"
    """The pass has no room for it."""


@dataclass(eq=False)
class Prefill:
    """One prompt, for all sequences that begin with exactly it."""

    adapter: Adapter
    lease: Lease
    sequences: list[Sequence]
    scoring: PromptScoring | None
    num_done: int
    """Tokens cached or computed."""
    num_cached: int
    """Of them, when it began."""

    @property
    def prompt(self) -> tuple[int, ...]:
        return self.sequences[0].request.prompt

    @property
    def num_left(self) -> int:
        return len(self.prompt) - self.num_done

    def take(self, digest: str, sequence: Sequence, *, can_score: bool) -> bool:
        """Whether it serves this sequence too. A prompt that is not computed yet can still be scored."""
        request = sequence.request
        if self.lease.digest != digest or self.prompt != request.prompt:
            return False
        if request.scoring is not None and request.scoring != self.scoring:
            if self.scoring is not None or not can_score:
                return False
            self.scoring = request.scoring
            self.num_cached = min(self.num_cached, _most_cached(request.prompt, request.scoring))
            self.num_done = self.num_cached
        self.sequences.append(sequence)
        return True


@dataclass(frozen=True)
class PrefillPass:
    """What one call of the network computes."""

    prefills: Items[Prefill]
    rows: Items[PrefillRow]
    """One per prefill."""
    sequences: Items[Sequence]
    """Those whose prompt is whole afterwards, in the order of their slots."""


class Prefills:
    """Used by one thread."""

    def __init__(self, network: Network, *, budget: int) -> None:
        self._network = network
        self._budget = budget
        self._cache = _empty_cache(network)
        self._short: list[Prefill] = []
        """For the next pass, whole."""
        self._long: Prefill | None = None

    @property
    def sequences(self) -> list[Sequence]:
        long = self._long.sequences if self._long is not None else []
        return [*long, *(sequence for prefill in self._short for sequence in prefill.sequences)]

    def admit(self, sequence: Sequence, weights: ServedWeights, adapter: Adapter) -> Admission:
        if self._join(sequence, weights.digest):
            return Admission.BEGUN
        prefill = self._look_up(sequence, weights, adapter)
        if self._cache.is_coming(prefill.lease, prefill.prompt):
            return self._decline(prefill, Admission.LATER)
        if prefill.num_left > self._budget and self._can_be_chunked(prefill):
            if self._long is not None:
                return self._decline(prefill, Admission.LATER)
            if self._extend_whole(prefill):
                self._long = prefill
                return Admission.BEGUN
        if self._short and self._num_short_tokens + prefill.num_left > self._short_budget:
            return self._decline(prefill, Admission.FULL)
        self._cache.extend(prefill.lease, prefill.prompt)
        self._short.append(prefill)
        return Admission.BEGUN

    def next_pass(self, first_slot: int) -> PrefillPass | None:
        """None when there is nothing to compute."""
        prefills = list(self._short)
        chunk: Prefill | None = None
        if self._long is not None:
            if self._long.num_left <= self._long_share:
                prefills.append(self._long)
            else:
                chunk = self._long
        rows = _final_rows(prefills, first_slot)
        if chunk is not None:
            rows.append((chunk, self._chunk_row(chunk)))
        if not rows:
            return None
        return PrefillPass(
            [prefill for prefill, _ in rows],
            [row for _, row in rows],
            [sequence for prefill in prefills for sequence in prefill.sequences],
        )

    def note_computed(self, done: PrefillPass) -> None:
        """What the pass computed is found by later prompts."""
        for prefill, row in zip(done.prefills, done.rows, strict=True):
            prefill.num_done = len(row.tokens)
            held = len(row.held) + len(row.kept)
            self._cache.commit(prefill.lease, held)
            if prefill.num_left == 0:
                self._cache.release(prefill.lease)
                if prefill is self._long:
                    self._long = None
        self._short.clear()

    def keep(self, sequence: Sequence, slot: int) -> None:
        """Of a sequence that leaves its slot: for a later turn that goes on from its answer."""
        weights = sequence.generation.weights
        if weights is None or sequence.is_mixed or self._network.num_blocks == 0:
            return
        # the last token was drawn, but never fed
        tokens = (*sequence.request.prompt, *sequence.generated[:-1])
        lease = self._cache.lookup(weights.digest, tokens)
        first = len(lease.blocks)
        self._cache.extend(lease, tokens)
        if len(lease.blocks) > first:
            self._network.keep(slot, first=first, blocks=lease.ids[first:])
            self._cache.commit(lease, len(lease.blocks))
        self._cache.release(lease)

    def cancel(self, generation: Generation) -> None:
        long = self._long
        if long is None:
            return
        others = [s for s in long.sequences if s.generation is not generation]
        if others:
            long.sequences = others
        else:
            self._cache.release(long.lease)
            self._long = None

    def take_back(self) -> list[Sequence]:
        """The sequences of a prompt that is half computed, to be admitted again."""
        if self._long is None:
            return []
        sequences = self._long.sequences
        self._cache.release(self._long.lease)
        self._long = None
        return sequences

    def forget(self) -> None:
        """Ends all prefills and empties the cache."""
        self._short.clear()
        self._long = None
        self._cache = _empty_cache(self._network)

    def forget_idle(self) -> None:
        """Empties the cache of what no prefill uses."""
        self._cache.evict_idle()

    def _join(self, sequence: Sequence, digest: str) -> bool:
        long = self._long
        if long is not None and long.take(digest, sequence, can_score=False):
            return True
        return any(prefill.take(digest, sequence, can_score=True) for prefill in self._short)

    @property
    def _num_short_tokens(self) -> int:
        return sum(prefill.num_left for prefill in self._short)

    @property
    def _short_budget(self) -> int:
        return self._budget if self._long is None else self._budget // 2

    @property
    def _long_share(self) -> int:
        return max(self._budget - self._num_short_tokens, self._budget // 2)

    def _look_up(self, sequence: Sequence, weights: ServedWeights, adapter: Adapter) -> Prefill:
        request = sequence.request
        lease = self._cache.lookup(weights.digest, request.prompt)
        num_kept = len(lease.blocks) * self._cache.block_tokens
        num_cached = min(num_kept, _most_cached(request.prompt, request.scoring))
        return Prefill(adapter, lease, [sequence], request.scoring, num_cached, num_cached)

    def _decline(self, prefill: Prefill, why: Admission) -> Admission:
        self._cache.release(prefill.lease)
        return why

    def _can_be_chunked(self, prefill: Prefill) -> bool:
        return prefill.scoring is None and self._network.num_blocks > 0

    def _extend_whole(self, prefill: Prefill) -> bool:
        """Takes all blocks of a prompt at once: a chunk that found none would be lost."""
        self._cache.extend(prefill.lease, prefill.prompt)
        return len(prefill.lease.blocks) == len(prefill.prompt) // self._cache.block_tokens

    def _chunk_row(self, prefill: Prefill) -> PrefillRow:
        size = self._cache.block_tokens
        first = prefill.num_done // size
        end = max(first + 1, (prefill.num_done + self._long_share) // size)
        ids = prefill.lease.ids
        return PrefillRow(
            tokens=prefill.prompt[: end * size],
            slots=(),
            adapter=prefill.adapter,
            start=prefill.num_done,
            held=ids[:first],
            kept=ids[first:end],
        )


def _empty_cache(network: Network) -> PrefixCache:
    return PrefixCache(num_blocks=network.num_blocks, block_tokens=network.block_tokens)


def _most_cached(prompt: tuple[int, ...], scoring: PromptScoring | None) -> int:
    """The last token is computed for what follows it, a scored one's predecessor for its score."""
    if scoring is None:
        return len(prompt) - 1
    if scoring.logprobs_from is None or scoring.targets or scoring.draws is not None:
        return 0
    return min(len(prompt), max(scoring.logprobs_from, 1)) - 1


def _final_rows(prefills: Items[Prefill], first_slot: int) -> list[tuple[Prefill, PrefillRow]]:
    """Rows of one adapter stand together; of these whole prompts first, short ones before long, so that
    neighbours of equal length run as one batched attention."""
    order = {adapter: i for i, adapter in enumerate(dict.fromkeys(p.adapter for p in prefills))}
    rows: list[tuple[Prefill, PrefillRow]] = []
    slot = first_slot
    for prefill in prefills:
        count = len(prefill.sequences)
        rows.append((prefill, _final_row(prefill, tuple(range(slot, slot + count)))))
        slot += count
    return sorted(
        rows, key=lambda row: (order[row[0].adapter], row[1].start > 0, row[1].num_computed)
    )


def _final_row(prefill: Prefill, slots: tuple[int, ...]) -> PrefillRow:
    lease = prefill.lease
    return PrefillRow(
        tokens=prefill.prompt,
        slots=slots,
        adapter=prefill.adapter,
        scoring=prefill.scoring,
        start=prefill.num_done,
        held=lease.ids[: lease.num_committed],
        kept=lease.ids[lease.num_committed :],
    )
