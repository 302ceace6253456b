"""How prompts and running sequences go through the model: the two ways to lay them out.

Axes: B running sequences, T prompt tokens of all rows, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from homefire.inference.engine.adapted_layers import AdaptedLayers, segments
from homefire.inference.engine.network import PrefillRow
from homefire.model.attention import AttentionContext, attending
from homefire.model.kv_blocks import BLOCK_TOKENS, Prefix
from homefire.model.layout import RowLayout
from homefire.model.loading import LoadedModel
from homefire.model.lora import LoraAdapter
from homefire.model.recurrent import RecurrentStates, decoded_hidden, text_hidden
from homefire.model.slots import SlotCache
from homefire.model.verdict import refuse_inexact_decoding

Adapters = Sequence[LoraAdapter | None]


class Passes(Protocol):
    """Owns what is kept of running sequences, in slots 0 … B-1."""

    def prefill(self, rows: Sequence[PrefillRow], adapters: Adapters) -> Tensor:
        """Hidden states [T, H] of what is computed of the rows, in their order. Routes the layers."""
        ...

    def decode(self, tokens: Sequence[int]) -> Tensor:
        """[B, H]. The layers are routed already."""
        ...

    def move(self, *, source: int, destination: int) -> None: ...

    def keep(self, slot: int, *, first: int, blocks: Sequence[int]) -> None: ...

    def num_blocks(self, max_bytes: int) -> int:
        """Of prompts' beginnings that can be kept beside the slots; 0 where prompts cannot go on from one."""
        ...


def open_passes(
    model: LoadedModel, layers: AdaptedLayers, *, max_slots: int, max_length: int
) -> Passes:
    """Unsupported where texts decoded beside each other are not each one's own."""
    cache = SlotCache(max_slots=max_slots, max_length=max_length, device=model.device)
    if model.layout is RowLayout.PACKED:
        return PackedPasses(model, layers, cache)
    refuse_inexact_decoding(model)
    return StatefulPasses(model, layers, cache, RecurrentStates(model.config, max_slots=max_slots))


class PackedPasses:
    """Prompts end to end in one pass; the tokens of running sequences in one row."""

    def __init__(self, model: LoadedModel, layers: AdaptedLayers, cache: SlotCache) -> None:
        self._model = model
        self._layers = layers
        self._cache = cache

    def prefill(self, rows: Sequence[PrefillRow], adapters: Adapters) -> Tensor:
        lengths = [row.num_computed for row in rows]
        tokens = torch.tensor([token for row in rows for token in row.tokens[row.start :]])
        positions = torch.cat([torch.arange(row.start, len(row.tokens)) for row in rows])
        prefixes = [Prefix(row.start, row.held, row.kept) for row in rows]
        context = self._cache.prefilling(lengths, [row.slots for row in rows], prefixes)
        self._layers.route(segments(adapters, lengths))
        return self._hidden(tokens, positions, context)

    def decode(self, tokens: Sequence[int]) -> Tensor:
        context = self._cache.decoding(len(tokens))
        return self._hidden(torch.tensor(tokens), context.positions, context)

    def move(self, *, source: int, destination: int) -> None:
        self._cache.move(source=source, destination=destination)

    def keep(self, slot: int, *, first: int, blocks: Sequence[int]) -> None:
        self._cache.keep(slot, first, blocks)

    def num_blocks(self, max_bytes: int) -> int:
        """The size of a token is found by running one."""
        one = torch.zeros(1, dtype=torch.int64)
        self._hidden(one, one, self._cache.prefilling([1], [[0]]))
        return max_bytes // (BLOCK_TOKENS * self._cache.token_bytes)

    def _hidden(self, tokens: Tensor, positions: Tensor, context: AttentionContext) -> Tensor:
        """tokens, positions int64 [T] -> [T, H]"""
        device = self._model.device
        with attending(context):
            output = self._model.backbone(
                input_ids=tokens[None].to(device),
                position_ids=positions[None].to(device),
                use_cache=False,
            )
        return output.last_hidden_state[0]


class StatefulPasses:
    """For models whose layers carry state between tokens: one prompt at a time, never padded, and a row
    per running sequence.

    Beginnings of prompts are not kept: the state after one is not in the blocks.
    """

    def __init__(
        self, model: LoadedModel, layers: AdaptedLayers, cache: SlotCache, states: RecurrentStates
    ) -> None:
        self._model = model
        self._layers = layers
        self._cache = cache
        self._states = states

    def prefill(self, rows: Sequence[PrefillRow], adapters: Adapters) -> Tensor:
        hidden: list[Tensor] = []
        for row, adapter in zip(rows, adapters, strict=True):
            tokens = torch.tensor(row.tokens, device=self._model.device)
            self._layers.route(segments([adapter], [len(tokens)]))
            hidden.append(text_hidden(self._model, self._cache, self._states, tokens, row.slots))
        return torch.cat(hidden)

    def decode(self, tokens: Sequence[int]) -> Tensor:
        given = torch.tensor(tokens, device=self._model.device)
        return decoded_hidden(self._model, self._cache, self._states, given)

    def move(self, *, source: int, destination: int) -> None:
        self._cache.move(source=source, destination=destination)
        self._states.move(source=source, destination=destination)

    def keep(self, slot: int, *, first: int, blocks: Sequence[int]) -> None:
        raise RuntimeError("this network has no blocks to keep a prompt's beginning in")

    def num_blocks(self, max_bytes: int) -> int:
        return 0
