"""Keys and values of running sequences: one slot each, per attention layer.

Slots are packed at the front: the sequences that run are slots 0 … B-1, so decoding reads a slice and
gathers nothing. Memory is taken per layer on first use, from the tensors' own shapes (families differ in
heads and widths, even between layers), and grows by doubling up to `max_slots` x `max_length`.

Axes: B running slots, T tokens, H query heads, G key/value heads, D key width, Dv value width,
S slots held, L tokens held per slot.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby
from typing import Protocol

import torch
from torch import Tensor, nn

from homefire.model.attention import PackedRows
from homefire.model.attention_rule import AttentionRule, Reach, softmax_attention
from homefire.model.kv_blocks import BLOCK_TOKENS, NO_PREFIX, KvBlocks, Prefix, kept_tokens

_FIRST_SLOTS = 8
_FIRST_LENGTH = 64


class SlotCache:
    """Owned by one thread. Every slot that is decoded was prefilled or moved to before."""

    def __init__(
        self, *, max_slots: int, max_length: int, device: torch.device | None = None
    ) -> None:
        self._max_slots = max_slots
        self._max_length = max_length
        self._num_slots = min(_FIRST_SLOTS, max_slots)
        self._length = min(_FIRST_LENGTH, max_length)
        self._layers: dict[nn.Module, _Layer] = {}
        self.blocks = KvBlocks()
        """Beginnings of texts, for prefills to go on from."""
        self.lengths = torch.zeros(max_slots, dtype=torch.int64, device=device)
        """Tokens in the cache, per slot [max_slots]."""

    def prefilling(
        self,
        lengths: Sequence[int],
        slots: Sequence[Sequence[int]],
        prefixes: Sequence[Prefix] | None = None,
    ) -> PrefillContext:
        """Row i, of `lengths[i]` tokens after its prefix, is computed once and kept in every one of
        `slots[i]`, of which there may be none."""
        begun = list(prefixes) if prefixes is not None else [NO_PREFIX] * len(lengths)
        totals = [prefix.length + length for prefix, length in zip(begun, lengths, strict=True)]
        self._reserve(1 + max((slot for row in slots for slot in row), default=0), max(totals))
        for total, row in zip(totals, slots, strict=True):
            self.lengths[list(row)] = total
        return PrefillContext(self, lengths, slots, begun)

    def keep(self, slot: int, first: int, blocks: Sequence[int]) -> None:
        """Copies a slot's tokens from block `first` of its text on into blocks."""
        start = first * BLOCK_TOKENS
        ids, tokens = kept_tokens([Prefix(kept=tuple(blocks))], [start], self.lengths.device)
        for module, layer in self._layers.items():
            self.blocks.fill(module, ids, layer.keys[slot], layer.values[slot], tokens)

    def decoding(self, num_running: int) -> DecodeContext:
        """One token for each of the first `num_running` slots, at the positions `lengths` had."""
        positions = self.lengths[:num_running].clone()
        longest = int(positions.max()) + 1
        self._reserve(num_running, longest)
        self.lengths[:num_running] += 1
        return DecodeContext(self, positions, longest)

    def move(self, *, source: int, destination: int) -> None:
        """The sequence in slot `source` goes on in slot `destination`."""
        length = int(self.lengths[source])
        for layer in self._layers.values():
            layer.move(source, destination, length)
        self.lengths[destination] = length

    @property
    def token_bytes(self) -> int:
        """Of one token's keys and values in all layers that were used yet."""
        return sum(layer.token_bytes for layer in self._layers.values())

    def layer(self, module: nn.Module, key: Tensor, value: Tensor) -> _Layer:
        """The storage of one attention module, as large as what is reserved."""
        layer = self._layers.get(module)
        if layer is None or layer.is_smaller_than(self._num_slots, self._length):
            layer = _Layer.like(key, value, self._num_slots, self._length, old=layer)
            self._layers[module] = layer
        return layer

    def _reserve(self, num_slots: int, length: int) -> None:
        self._num_slots = _grown(self._num_slots, num_slots, self._max_slots)
        self._length = _grown(self._length, length, self._max_length)


def _grown(held: int, needed: int, limit: int) -> int:
    if needed > limit:
        raise ValueError(f"the cache holds {limit}, {needed} are needed")
    while held < needed:
        held *= 2
    return min(held, limit)


class _Layer:
    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys = keys
        """[S, G, L, D]"""
        self.values = values
        """[S, G, L, Dv]"""

    @classmethod
    def like(
        cls, key: Tensor, value: Tensor, num_slots: int, length: int, *, old: _Layer | None
    ) -> _Layer:
        """Zeroed, not empty: masked positions are multiplied by 0, and 0 x NaN is NaN."""
        shape = (num_slots, key.shape[1], length)
        layer = cls(key.new_zeros(*shape, key.shape[3]), value.new_zeros(*shape, value.shape[3]))
        if old is not None:
            held_slots, _, held_length, _ = old.keys.shape
            layer.keys[:held_slots, :, :held_length] = old.keys
            layer.values[:held_slots, :, :held_length] = old.values
        return layer

    @property
    def token_bytes(self) -> int:
        return sum(
            kept.shape[1] * kept.shape[3] * kept.element_size() for kept in (self.keys, self.values)
        )

    def is_smaller_than(self, num_slots: int, length: int) -> bool:
        return self.keys.shape[0] < num_slots or self.keys.shape[2] < length

    def move(self, source: int, destination: int, length: int) -> None:
        self.keys[destination, :, :length] = self.keys[source, :, :length]
        self.values[destination, :, :length] = self.values[source, :, :length]


class PrefillContext:
    """Prompts end to end, whole or from their prefix on; their keys and values are kept.

    Whole ones attend as PackedRows. One with a prefix attends to that and to itself.
    """

    def __init__(
        self,
        cache: SlotCache,
        lengths: Sequence[int],
        slots: Sequence[Sequence[int]],
        prefixes: list[Prefix],
    ) -> None:
        self._cache = cache
        self._parts = list(_parts(cache, lengths, slots, prefixes))
        starts = [end - length for end, length in zip(accumulate(lengths), lengths, strict=True)]
        self._kept = kept_tokens(prefixes, starts, cache.lengths.device)

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule
    ) -> Tensor:
        blocks, tokens = self._kept
        if len(blocks):
            self._cache.blocks.fill(module, blocks, key[0], value[0], tokens)
        outputs: list[Tensor] = []
        for part in self._parts:
            q, k, v = (tensor[:, :, part.span] for tensor in (query, key, value))
            outputs.append(part.attend(module, q, k, v, rule))
        return torch.cat(outputs, 1)


class _Part(Protocol):
    """Neighbouring rows that are attended together; `span` is where they lie among the tokens."""

    span: slice

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule
    ) -> Tensor:
        """Of the span's tokens only."""
        ...


class _WholeRows:
    def __init__(
        self, cache: SlotCache, start: int, lengths: Sequence[int], slots: Sequence[Sequence[int]]
    ) -> None:
        self.span = slice(start, start + sum(lengths))
        self._cache = cache
        self._packed = PackedRows(lengths)
        self._runs = _runs(lengths, slots)

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule
    ) -> Tensor:
        layer = self._cache.layer(module, key, value)
        for run in self._runs:
            layer.keys[run.slots, :, : run.length] = run.rows_of(key)
            layer.values[run.slots, :, : run.length] = run.rows_of(value)
        return self._packed.attend(module, query, key, value, rule)


class _ContinuedRow:
    def __init__(
        self, cache: SlotCache, start: int, length: int, slots: Sequence[int], prefix: Prefix
    ) -> None:
        self.span = slice(start, start + length)
        self._cache = cache
        device = cache.lengths.device
        self._slots = torch.tensor(slots, dtype=torch.int64, device=device)
        self._held = torch.tensor(prefix.held, dtype=torch.int64, device=device)
        self._prefix_length = prefix.length
        self._positions = torch.arange(prefix.length + length, device=device)
        self._masks: dict[Reach, Tensor] = {}

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule
    ) -> Tensor:
        begun = self._cache.blocks.beginning(module, self._held, self._prefix_length)
        keys, values = (
            torch.cat([old, new[0]], 1) for old, new in zip(begun, (key, value), strict=True)
        )
        layer = self._cache.layer(module, key, value)
        layer.keys[self._slots, :, : keys.shape[1]] = keys
        layer.values[self._slots, :, : values.shape[1]] = values
        mask = self._mask(rule.reach, query.dtype)
        return softmax_attention(query, keys[None], values[None], rule, mask).transpose(1, 2)

    def _mask(self, reach: Reach, dtype: torch.dtype) -> Tensor:
        """[1, 1, length, prefix + length], one for all layers of that reach."""
        if reach not in self._masks:
            own = self._positions[self._prefix_length :]
            self._masks[reach] = reach.mask(own, self._positions, dtype)[None, None]
        return self._masks[reach]


def _parts(
    cache: SlotCache,
    lengths: Sequence[int],
    slots: Sequence[Sequence[int]],
    prefixes: Sequence[Prefix],
) -> Iterator[_Part]:
    row, start = 0, 0
    for is_begun, same in groupby(prefixes, key=lambda prefix: prefix.length > 0):
        count = len(list(same))
        rows = range(row, row + count)
        if is_begun:
            for i in rows:
                yield _ContinuedRow(cache, start, lengths[i], slots[i], prefixes[i])
                start += lengths[i]
        else:
            yield _WholeRows(cache, start, lengths[row : row + count], slots[row : row + count])
            start += sum(lengths[row : row + count])
        row += count


class _Run:
    """Neighbouring rows of one length, and the slots that each of them goes to."""

    def __init__(self, start: int, length: int, slots: Sequence[Sequence[int]]) -> None:
        self.length = length
        self.slots = torch.tensor([slot for row in slots for slot in row], dtype=torch.int64)
        self._span = slice(start, start + length * len(slots))
        self._num_rows = len(slots)
        self._row_of_slot = torch.tensor(
            [i for i, row in enumerate(slots) for _ in row], dtype=torch.int64
        )

    def rows_of(self, tensor: Tensor) -> Tensor:
        """[1, G, T, D] -> [slots of the run, G, length, D]"""
        _, heads, _, width = tensor.shape
        rows = tensor[0, :, self._span].reshape(heads, self._num_rows, self.length, width)
        return rows.transpose(0, 1)[self._row_of_slot]


def _runs(lengths: Sequence[int], slots: Sequence[Sequence[int]]) -> list[_Run]:
    runs: list[_Run] = []
    row, start = 0, 0
    for length, same in groupby(lengths):
        count = len(list(same))
        runs.append(_Run(start, length, slots[row : row + count]))
        row, start = row + count, start + length * count
    return runs


class DecodeContext:
    """One query token per running slot, over all that the slot holds."""

    def __init__(self, cache: SlotCache, positions: Tensor, longest: int) -> None:
        self.positions = positions
        """int64 [B]: where each slot's token stands in its text."""
        self._cache = cache
        self._rows = torch.arange(len(positions), device=positions.device)
        self._longest = longest
        self._masks: dict[Reach, Tensor] = {}

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule
    ) -> Tensor:
        layer = self._cache.layer(module, key, value)
        layer.keys[self._rows, :, self.positions] = key[0].transpose(0, 1)
        layer.values[self._rows, :, self.positions] = value[0].transpose(0, 1)
        num_rows = len(self._rows)
        output = softmax_attention(
            query[0].transpose(0, 1)[:, :, None],
            layer.keys[:num_rows, :, : self._longest],
            layer.values[:num_rows, :, : self._longest],
            rule,
            self._mask(rule.reach, query.dtype),
        )
        return output[:, :, 0][None]

    def _mask(self, reach: Reach, dtype: torch.dtype) -> Tensor:
        """[B, 1, 1, longest], one for all layers of that reach."""
        if reach not in self._masks:
            held = torch.arange(self._longest, device=self.positions.device)
            self._masks[reach] = reach.mask(self.positions[:, None], held, dtype)[:, None]
        return self._masks[reach]
