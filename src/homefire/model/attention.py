"""The one place where attention of an unmodified transformers model is swapped for ours.

transformers looks attention up by name. We register one function and one mask function under
`ATTENTION`; the function passes the call to whatever `AttentionContext` is active, so the trainer
(packed rows) and the sampler (a key/value cache) run the very same network definition.

The window comes from the *mask*, not from the `sliding_window` argument: several families never pass
the argument (Qwen2-MoE, Llama 4).

Axes: T tokens, H query heads, G key/value heads, D key width, Dv value width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from homefire.model import varlen
from homefire.model.attention_rule import AttentionRule, Reach, softmax_attention
from homefire.model.varlen import VarlenRows
from homefire.wire.errors import Unsupported

ATTENTION = "homefire"
"""The name under which transformers finds our attention."""

_CHUNKS = "chunked_overlay"
_EXACT_PIECES = frozenset(
    {
        "causal_mask_function",
        "sliding_window_overlay",
        _CHUNKS,
        "packed_sequence_mask_function",
        "packed_sequence_compatibility_function",
        "remap_positions_for_packed_sequence",
        "and_masks",
    }
)
"""What a mask may be composed of. Rows are separated by us, so the packed pieces add nothing."""

_NEUTRAL_ARGUMENTS = frozenset(
    {
        "cache_position",
        "dropout",
        "is_causal",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "sliding_window",
        "use_cache",
    }
)
"""Arguments that models hand to attention and that change nothing for causal text in eval mode."""


@dataclass(frozen=True)
class MaskShape:
    """What the mask function returns instead of a tensor: the mask's shape, by name."""

    reach: Reach
    pieces: frozenset[str]

    def __getitem__(self, index: object) -> MaskShape:
        """Gemma 4 slices its masks for the layers that share keys and values."""
        return self


class AttentionContext(Protocol):
    """How the tokens of the current forward pass lie, and where their keys and values are kept."""

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule
    ) -> Tensor:
        """query [1, H, T, D], key [1, G, T, D], value [1, G, T, Dv] -> [1, T, H, Dv].

        `module` is the attention layer that asks (a key for caches).
        """
        ...


_active: ContextVar[AttentionContext | None] = ContextVar("homefire_attention", default=None)


@contextmanager
def attending(context: AttentionContext) -> Iterator[None]:
    """Forward passes of this thread attend through `context` until the block ends."""
    token = _active.set(context)
    try:
        yield
    finally:
        _active.reset(token)


class PackedRows:
    """Rows lie end to end in one sequence; each attends causally to itself alone.

    Neighbours of equal length go through one batched call; on CUDA all rows do, where the kernel has
    what the layer asks for.

    Example: PackedRows([3, 3, 5]) for T = 11.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self._lengths = list(lengths)
        self._runs = [(length, len(list(run))) for length, run in groupby(lengths)]
        self._varlen: VarlenRows | None = None
        self._masks: dict[tuple[Reach, int], Tensor] = {}

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule
    ) -> Tensor:
        if varlen.runs(query, value, rule):
            self._varlen = self._varlen or VarlenRows(self._lengths, query.device)
            return self._varlen.attend(query, key, value, rule)
        outputs: list[Tensor] = []
        start = 0
        for length, count in self._runs:
            span = slice(start, start + length * count)
            rows = [_rows(tensor[0, :, span], count) for tensor in (query, key, value)]
            output = softmax_attention(*rows, rule, self._mask(rule.reach, length, query))
            outputs.append(output.transpose(1, 2).flatten(0, 1))
            start = span.stop
        return torch.cat(outputs)[None]

    def _mask(self, reach: Reach, length: int, like: Tensor) -> Tensor | None:
        """[1, 1, length, length], one for all layers; None where plain causal attention is the same."""
        if not reach.cuts(length):
            return None
        if (reach, length) not in self._masks:
            positions = torch.arange(length, device=like.device)
            mask = reach.mask(positions, positions, like.dtype)
            self._masks[reach, length] = mask[None, None]
        return self._masks[reach, length]


def _rows(tensor_HTD: Tensor, count: int) -> Tensor:
    """[H, count * length, D] -> [count, H, length, D]."""
    heads, _, width = tensor_HTD.shape
    return tensor_HTD.reshape(heads, count, -1, width).transpose(0, 1)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: MaskShape | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    context = _active.get()
    if context is None:
        raise RuntimeError("a model with homefire's attention ran outside `attending(...)`")
    _refuse_what_would_be_ignored(attention_mask, arguments)
    reach = attention_mask.reach if attention_mask is not None else Reach()
    rule = AttentionRule(reach, scaling=scaling, softcap=softcap, sinks=s_aux)
    return context.attend(module, query, key, value, rule), None


def _refuse_what_would_be_ignored(mask: MaskShape | None, arguments: dict[str, Any]) -> None:
    """Never wrong in silence: position biases, indexers and unknown masks are errors."""
    if mask is not None and not isinstance(mask, MaskShape):
        raise Unsupported("the model builds its own attention mask")
    if mask is not None and not mask.pieces <= _EXACT_PIECES:
        names = sorted(mask.pieces - _EXACT_PIECES)
        raise Unsupported(f"the model's attention mask needs {', '.join(names)}")
    unknown = sorted(
        name
        for name, value in arguments.items()
        if value is not None and name not in _NEUTRAL_ARGUMENTS
    )
    if unknown:
        raise Unsupported(f"the model's attention takes {', '.join(unknown)}")
    if arguments.get("dropout"):
        raise Unsupported("the model's attention asks for dropout")


def _mask_shape(
    *args: object,
    mask_function: Callable[..., object],
    local_size: int | None = None,
    **options: object,
) -> MaskShape:
    pieces = frozenset(_pieces(mask_function))
    size = local_size or None
    is_chunked = _CHUNKS in pieces
    reach = Reach(chunk=size) if is_chunked else Reach(window=size)
    return MaskShape(reach, pieces)


def _pieces(function: Callable[..., object]) -> Iterator[str]:
    """The names of the functions that a transformers mask function was composed of."""
    yield getattr(function, "__qualname__", repr(function)).split(".")[0]
    for cell in getattr(function, "__closure__", None) or ():
        content = cell.cell_contents
        for item in content if isinstance(content, tuple | list) else (content,):
            if callable(item):
                yield from _pieces(item)


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, _mask_shape)
