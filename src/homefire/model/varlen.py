"""Packed rows through torch's own variable-length attention, which runs on CUDA alone.

`torch.nn.attention.varlen` (torch 2.13) takes rows end to end with no padding and no mask, forward and
backward, grouped heads, a scale and a window. It has no soft cap, sinks or chunks, and wants 16-bit
numbers and keys as wide as values: `runs` says where, and everything else goes row by row through
`softmax_attention`, which is the same attention.

Axes: T tokens, H query heads, G key/value heads, D key and value width, N rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from homefire.model.attention_rule import AttentionRule

Kernel = Callable[..., Any]
_DTYPES = (torch.bfloat16, torch.float16)
_MAX_WIDTH = 256
"""Of a head, for flash attention."""
_WIDTH_STEP = 8
_CAUSAL = (-1, 0)
"""The window of plain causal attention."""


def runs(query: Tensor, value: Tensor, rule: AttentionRule) -> bool:
    """Whether the kernel has all terms of the rule, for tensors like these."""
    return query.device.type == "cuda" and fits(query.dtype, query.shape[-1], value.shape[-1], rule)


def fits(dtype: torch.dtype, key_width: int, value_width: int, rule: AttentionRule) -> bool:
    """`runs`, but for the device."""
    is_narrow = key_width <= _MAX_WIDTH and key_width % _WIDTH_STEP == 0
    return dtype in _DTYPES and key_width == value_width and is_narrow and not rule.uncommon


class VarlenRows:
    """Rows of these lengths, end to end, each causal in itself."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        edges = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        self._edges = edges.to(device)
        """[N + 1]"""
        self._longest = max(lengths)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rule: AttentionRule,
        kernel: Kernel | None = None,
    ) -> Tensor:
        """query [1, H, T, D], key and value [1, G, T, D] -> [1, T, H, D]."""
        q, k, v = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))
        options = {
            "scale": rule.scaling,
            "window_size": window_size(rule),
            "enable_gqa": q.shape[1] != k.shape[1],
        }
        run = kernel or _varlen_attn()
        output = run(q, k, v, self._edges, self._edges, self._longest, self._longest, **options)
        return output[None]


def window_size(rule: AttentionRule) -> tuple[int, int]:
    """Keys on the left of a query, and on the right. The kernel counts those beside the query's own
    token, a rule's window with it."""
    window = rule.reach.window
    return _CAUSAL if window is None else (window - 1, 0)


def _varlen_attn() -> Kernel:
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn
