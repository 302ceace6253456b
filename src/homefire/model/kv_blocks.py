"""Keys and values kept beside the slots, in blocks of a few tokens: beginnings of texts to go on from.

Which text a block holds is its user's to know. Memory is taken per layer as blocks are first filled.

Axes: N blocks, G key/value heads, S tokens of one block, D key width, Dv value width, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

BLOCK_TOKENS = 16
"""Few, since a text that goes on from a block's middle computes its tokens again."""
_FIRST_BLOCKS = 64


@dataclass(frozen=True)
class Prefix:
    """A row's beginning that need not be computed, and the blocks that its continuation fills."""

    length: int = 0
    """Tokens; the row's own follow."""
    held: tuple[int, ...] = ()
    """Whole blocks of the text's first tokens, `length` or more."""
    kept: tuple[int, ...] = ()
    """Blocks for the tokens after those of `held`."""


NO_PREFIX = Prefix()


class KvBlocks:
    """Owned by one thread."""

    def __init__(self) -> None:
        self._layers: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        """keys [N, G, S, D] and values [N, G, S, Dv]"""

    def fill(
        self, module: nn.Module, blocks: Tensor, key: Tensor, value: Tensor, tokens: Tensor
    ) -> None:
        """blocks int64 [m]; key [G, T, D], value [G, T, Dv]; tokens int64 [m, S]: which of the T."""
        keys, values = self._reserve(module, int(blocks.max()) + 1, key, value)
        keys[blocks] = key[:, tokens].transpose(0, 1)
        values[blocks] = value[:, tokens].transpose(0, 1)

    def beginning(self, module: nn.Module, blocks: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Copies of the first `length` tokens: [G, length, D] and [G, length, Dv]."""
        keys, values = self._layers[module]
        return _joined(keys, blocks)[:, :length], _joined(values, blocks)[:, :length]

    def _reserve(
        self, module: nn.Module, count: int, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        held = self._layers.get(module)
        if held is None or len(held[0]) < count:
            size = max(_FIRST_BLOCKS, count if held is None else max(count, 2 * len(held[0])))
            held = _grown(held and held[0], key, size), _grown(held and held[1], value, size)
            self._layers[module] = held
        return held


def _grown(old: Tensor | None, like: Tensor, count: int) -> Tensor:
    new = like.new_empty(count, like.shape[0], BLOCK_TOKENS, like.shape[2])
    if old is not None:
        new[: len(old)] = old
    return new


def _joined(blocks_NGSD: Tensor, ids: Tensor) -> Tensor:
    """[G, len(ids) * S, D]"""
    return blocks_NGSD[ids].transpose(0, 1).flatten(1, 2)


def kept_tokens(
    prefixes: list[Prefix], starts: list[int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Which blocks one pass fills [m], and with which of its tokens [m, S]; row i's own begin at
    `starts[i]`."""
    blocks = [block for prefix in prefixes for block in prefix.kept]
    first = [
        start - prefix.length + (len(prefix.held) + i) * BLOCK_TOKENS
        for prefix, start in zip(prefixes, starts, strict=True)
        for i in range(len(prefix.kept))
    ]
    within = torch.arange(BLOCK_TOKENS, device=device)
    tokens = torch.tensor(first, dtype=torch.int64, device=device)[:, None] + within
    return torch.tensor(blocks, dtype=torch.int64, device=device), tokens
