"""Keys and values of running sequences: one slot each, per attention layer.

Slots are packed at the front: the sequences that run are slots 0 … B-1, so decoding reads a slice and
gathers nothing. Memory is taken per layer on first use, from the tensors' own shapes (families differ in
heads and widths, even between layers), and grows by doubling up to `max_slots` x `max_length`.

Axes: B running slots, T tokens, H query heads, G key/value heads, D key width, Dv value width,
S slots held, L tokens held per slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from homefire.model.attention import PackedRows
from homefire.model.attention_rule import AttentionRule, Reach, softmax_attention

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
        self.lengths = torch.zeros(max_slots, dtype=torch.int64, device=device)
        """Tokens in the cache, per slot [max_slots]."""

    def prefilling(self, lengths: Sequence[int], slots: Sequence[Sequence[int]]) -> PrefillContext:
        """Row i, of `lengths[i]` tokens, is computed once and kept in every one of `slots[i]`."""
        self._reserve(1 + max(slot for row in slots for slot in row), max(lengths))
        for length, row in zip(lengths, slots, strict=True):
            self.lengths[list(row)] = length
        return PrefillContext(self, lengths, slots)

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

    def is_smaller_than(self, num_slots: int, length: int) -> bool:
        return self.keys.shape[0] < num_slots or self.keys.shape[2] < length

    def move(self, source: int, destination: int, length: int) -> None:
        self.keys[destination, :, :length] = self.keys[source, :, :length]
        self.values[destination, :, :length] = self.values[source, :, :length]


class PrefillContext:
    """Whole prompts end to end; attention is PackedRows', keys and values are kept."""

    def __init__(
        self, cache: SlotCache, lengths: Sequence[int], slots: Sequence[Sequence[int]]
    ) -> None:
        self._cache = cache
        self._packed = PackedRows(lengths)
        self._runs = list(_runs(lengths, slots))

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule
    ) -> Tensor:
        layer = self._cache.layer(module, key, value)
        for run in self._runs:
            layer.keys[run.slots, :, : run.length] = run.rows_of(key)
            layer.values[run.slots, :, : run.length] = run.rows_of(value)
        return self._packed.attend(module, query, key, value, rule)


class _Run:
    """Neighbouring rows of one length, and the slots that each of them goes to."""

    def __init__(self, start: int, length: int, slots: Sequence[Sequence[int]]) -> None:
        self.length = length
        self.slots = torch.tensor([slot for row in slots for slot in row])
        self._span = slice(start, start + length * len(slots))
        self._num_rows = len(slots)
        self._row_of_slot = torch.tensor([i for i, row in enumerate(slots) for _ in row])

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
