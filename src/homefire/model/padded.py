"""Rows beside each other, padded on the right, for models whose layers carry state between tokens.

What stands on the right of a token cannot reach it: attention is causal and state runs forward. So the
padding needs no mask, and its hidden states are dropped.

Axes: B rows, L tokens of the longest, T tokens of all rows, H query heads, D key width, W hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from homefire.model.attention import AttentionContext, PackedRows, attending
from homefire.model.attention_rule import AttentionRule
from homefire.model.recompute import Reentry, recomputing

if TYPE_CHECKING:
    from homefire.model.loading import LoadedModel

_MIN_FILL = 0.75
"""Of a padded row that is tokens: rows of very different lengths do not go together."""


def padded_hidden(
    model: LoadedModel,
    tokens: Tensor,
    lengths: Sequence[int],
    *,
    recompute: int = 0,
    reentries: Sequence[Reentry] = (),
) -> Tensor:
    """tokens int [T] of rows end to end -> [T, W] in the same order; see `packed_hidden`."""
    rows = tokens.split(list(lengths))
    hidden: dict[int, Tensor] = {}
    for group in batches(lengths):
        padded = pad_sequence([rows[row] for row in group], batch_first=True)
        states = _batch_hidden(model, padded, recompute, reentries)
        hidden |= {row: states[place, : lengths[row]] for place, row in enumerate(group)}
    return torch.cat([hidden[row] for row in range(len(rows))])


def batches(lengths: Sequence[int]) -> list[list[int]]:
    """Which rows go together, longest first. A function of the lengths alone, so that a replay gives
    the same bits.

    Example: batches([9, 30, 8]) == [[1], [0, 2]]
    """
    by_length = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    groups: list[list[int]] = []
    for row in by_length:
        if groups and lengths[row] >= _MIN_FILL * lengths[groups[-1][0]]:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def _batch_hidden(
    model: LoadedModel, tokens_BL: Tensor, recompute: int, reentries: Sequence[Reentry]
) -> Tensor:
    num_rows, length = tokens_BL.shape
    positions = torch.arange(length, device=tokens_BL.device).expand(num_rows, -1)
    context = ByRow(PackedRows([length] * num_rows))
    again = [lambda: attending(context), *reentries]
    with attending(context), recomputing(model, recompute, again):
        output = model.backbone(input_ids=tokens_BL, position_ids=positions, use_cache=False)
    return output.last_hidden_state


class ByRow:
    """An `AttentionContext` for [B, …, L, …] inputs over one for the same tokens end to end."""

    def __init__(self, packed: AttentionContext) -> None:
        self._packed = packed

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule
    ) -> Tensor:
        num_rows = len(query)
        query, key, value = (
            tensor.transpose(0, 1).flatten(1, 2)[None] for tensor in (query, key, value)
        )
        flat = self._packed.attend(module, query, key, value, rule)
        return flat[0].unflatten(0, (num_rows, -1))
