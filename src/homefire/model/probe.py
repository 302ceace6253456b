"""What running a model shows about our attention: do rows stay apart, and equal its own attention?

Rows are a few tokens long, and windows are narrowed meanwhile so that they bite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig

from homefire.model.attention import ATTENTION
from homefire.model.packed import packed_hidden, packed_logprobs
from homefire.model.recurrent import RecurrentStates, cache_argument, decoded_hidden, text_hidden
from homefire.model.slots import SlotCache

if TYPE_CHECKING:
    from homefire.model.loading import LoadedModel

_LENGTHS = (12, 14, 11)
"""Near enough to one another to share a batch where rows are padded, and longer than `_WINDOW`."""
_WINDOW = 4
_NUM_DECODED = 4
_WINDOW_FIELDS = ("sliding_window", "attention_chunk_size")


@dataclass(frozen=True)
class Measured:
    """In nats, the worst over all positions. Not a number where the model gives none."""

    leak: float
    """How far a row's logprobs move when its neighbours' tokens change."""
    error: float
    """How far logprobs are from the model's own attention and head, row by row."""
    typical_error: float
    """The same of the median position, not the worst."""


@torch.no_grad()
def measure(model: LoadedModel) -> Measured:
    """Unsupported where the hook refuses what the model asks of it. Leaves the model as it was."""
    rows = _rows(model)
    with _narrow_windows(model.module):
        ours, own = torch.cat(_packed(model, rows)), torch.cat(_own(model, rows))
        leak = _leak(model, rows)
    apart = (ours - own).abs()
    return Measured(leak, error=float(apart.max()), typical_error=float(apart.median()))


@torch.no_grad()
def decoding_error(model: LoadedModel) -> float:
    """How far texts that are decoded beside each other are from the model's own decoding of each alone,
    with its own attention and cache, in nats. For padded layouts. Leaves the model as it was."""
    rows = _rows(model)
    with _narrow_windows(model.module):
        ours, own = _decoded(model, rows), _with_own_attention(model, _own_decoded, rows)
    return max(float((one - other).abs().max()) for one, other in zip(ours, own, strict=True))


def _decoded(model: LoadedModel, rows: list[Tensor]) -> list[Tensor]:
    slots = SlotCache(max_slots=len(rows), max_length=max(_LENGTHS), device=model.device)
    states = RecurrentStates(model.config, max_slots=len(rows))
    hidden = [
        text_hidden(model, slots, states, row[:-_NUM_DECODED], [slot])
        for slot, row in enumerate(rows)
    ]
    for step in range(-_NUM_DECODED, 0):
        one_each = torch.stack([row[step] for row in rows])
        for slot, state in enumerate(decoded_hidden(model, slots, states, one_each)):
            hidden[slot] = torch.cat([hidden[slot], state[None]])
    head = model.logits_head
    return [_logprobs(head.logits(states), row) for states, row in zip(hidden, rows, strict=True)]


def _own_decoded(model: LoadedModel, row: Tensor) -> Tensor:
    cache = DynamicCache(config=model.config)
    named = {cache_argument(model.module): cache}
    positions = torch.arange(len(row), device=row.device)
    cuts = [len(row) - _NUM_DECODED, *[1] * _NUM_DECODED]
    logits = [
        model.module(input_ids=part[None], position_ids=at[None], use_cache=True, **named).logits[0]
        for part, at in zip(row.split(cuts), positions.split(cuts), strict=True)
    ]
    return _logprobs(torch.cat(logits), row)


def _rows(model: LoadedModel) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(model.vocab_size, (length,), generator=generator).to(model.device)
        for length in _LENGTHS
    ]


@contextmanager
def _narrow_windows(module: nn.Module) -> Iterator[None]:
    """Real windows are thousands of tokens. Masks read them from the configuration at every pass, the
    model's own attention as ours."""
    found = [getattr(part, "config", None) for part in module.modules()]
    configs = {id(config): config for config in found if isinstance(config, PreTrainedConfig)}
    wide = [
        (config, field, size)
        for config in configs.values()
        for field in _WINDOW_FIELDS
        if isinstance(size := getattr(config, field, None), int) and size > _WINDOW
    ]
    for config, field, _ in wide:
        setattr(config, field, _WINDOW)
    try:
        yield
    finally:
        for config, field, size in wide:
            setattr(config, field, size)


def _packed(model: LoadedModel, rows: list[Tensor]) -> list[Tensor]:
    lengths = [len(row) for row in rows]
    tokens = torch.cat(rows)
    hidden = packed_hidden(model, tokens, lengths)
    logprobs = packed_logprobs(model, hidden, tokens.roll(-1))
    return [row[:-1] for row in logprobs.split(lengths)]


def _leak(model: LoadedModel, rows: list[Tensor]) -> float:
    others = [(row + 1) % model.vocab_size for row in rows[:-1]]
    moved = _packed(model, rows)[-1] - _packed(model, [*others, rows[-1]])[-1]
    return float(moved.abs().max())


def _own(model: LoadedModel, rows: list[Tensor]) -> list[Tensor]:
    """The model's own causal forward, one row at a time, with its own attention and head."""
    return _with_own_attention(model, _own_forward, rows)


def _own_forward(model: LoadedModel, row: Tensor) -> Tensor:
    return _logprobs(model.module(input_ids=row[None], use_cache=False).logits[0], row)


def _with_own_attention(
    model: LoadedModel, run: Callable[[LoadedModel, Tensor], Tensor], rows: list[Tensor]
) -> list[Tensor]:
    model.module.set_attn_implementation("eager")
    try:
        return [run(model, row) for row in rows]
    finally:
        model.module.set_attn_implementation(ATTENTION)


def _logprobs(logits: Tensor, row: Tensor) -> Tensor:
    """Of the row's own tokens, under logits [T, V]."""
    return logits[:-1].float().log_softmax(-1).gather(-1, row[1:, None])[:, 0]
