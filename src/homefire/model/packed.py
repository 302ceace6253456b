"""Rows packed end to end through the model, and logprobs of targets without full logits.

Axes: T tokens of all rows, M rows of hidden states, H hidden, V vocabulary, K targets per token,
r adapter rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from homefire.model.attention import PackedRows, attending
from homefire.model.head import Head, LowRank, ScaledLogits
from homefire.model.head_loss import (
    FusedLoss,
    HeadInputs,
    SpanGradientOf,
    TargetLogprobs,
    spans,
)
from homefire.model.layout import RowLayout
from homefire.model.padded import padded_hidden
from homefire.model.recompute import Reentry, recomputing

if TYPE_CHECKING:
    from homefire.model.loading import LoadedModel

HEAD_CHUNK = 512
"""Tokens whose logits exist at once: 512 x 150k float32 logits are 0.3 GB."""


def packed_hidden(
    model: LoadedModel,
    tokens: Tensor,
    lengths: Sequence[int],
    *,
    recompute: int = 0,
    reentries: Sequence[Reentry] = (),
) -> Tensor:
    """tokens int [T], lengths summing to T -> [T, H], float32. Differentiable in the weights.

    The order is that of the tokens whatever the model's layout. `recompute` decoder layers compute
    their activations again in backward; `reentries` are the contexts of this call that those need.
    """
    if model.layout is RowLayout.PADDED:
        return padded_hidden(model, tokens, lengths, recompute=recompute, reentries=reentries)
    positions = torch.cat([torch.arange(length, device=tokens.device) for length in lengths])
    context = PackedRows(lengths)
    again = [lambda: attending(context), *reentries]
    with attending(context), recomputing(model, recompute, again):
        output = model.backbone(
            input_ids=tokens[None], position_ids=positions[None], use_cache=False
        )
    return output.last_hidden_state[0]


def packed_logprobs(model: LoadedModel, hidden: Tensor, targets: Tensor) -> Tensor:
    """Logprobs of targets int64 [T] or [T, K] under the model's own head."""
    return target_logprobs(hidden, model.logits_head, targets)


def target_logprobs(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    chunk: int = HEAD_CHUNK,
    *,
    low_rank: LowRank | None = None,
) -> Tensor:
    """log softmax(head(hidden))[targets], `chunk` tokens at a time.

    hidden [M, H], targets int64 [M] or [M, K] -> float32 of the targets' shape. `low_rank` is an
    adapter on the head. Backward recomputes each chunk's logits, so no tensor of M x V outlives a
    chunk.
    """
    columns = targets if targets.dim() == 2 else targets[:, None]
    if isinstance(head.form, ScaledLogits):
        logprobs = TargetLogprobs.apply(
            columns, head.form, chunk, *_head_inputs(hidden, head, low_rank)
        )
    else:
        logprobs = _recomputed_logprobs(hidden, head, columns, chunk, low_rank)
    return logprobs if targets.dim() == 2 else logprobs[:, 0]


def fused_backward(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    gradient_of: SpanGradientOf,
    chunk: int = HEAD_CHUNK,
    *,
    low_rank: LowRank | None = None,
    always: bool = False,
) -> Tensor:
    """`target_logprobs` and its backward, in one sweep over the chunks: no logits are computed twice.

    targets int64 [M, K]. `gradient_of` is asked for each chunk's derivative while its logits exist, so
    it must not depend on other tokens. Gradients are added to the leaves, with the bits that
    `target_logprobs(...).backward(...)` gives. Where all is zero nothing is pushed, unless `always`:
    a backward that other ranks share waits for this one.
    """
    logprobs, pending = fused_loss(
        hidden, head, targets, gradient_of, chunk, low_rank=low_rank, always=always
    )
    if pending is not None:
        pending.output.backward(pending.gradient)
    return logprobs


@dataclass(frozen=True)
class PendingBackward:
    """What `output.backward(gradient)` still has to do."""

    output: Tensor
    gradient: Tensor


def fused_loss(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    gradient_of: SpanGradientOf,
    chunk: int = HEAD_CHUNK,
    *,
    low_rank: LowRank | None = None,
    always: bool = False,
) -> tuple[Tensor, PendingBackward | None]:
    """The head's part of `fused_backward`: logprobs, and the backward behind it; None without
    gradient, unless `always`."""
    if not isinstance(head.form, ScaledLogits):
        logprobs = target_logprobs(hidden, head, targets, chunk, low_rank=low_rank)
        grad = gradient_of(logprobs.detach(), slice(0, len(targets)))
        return logprobs.detach(), PendingBackward(logprobs, grad) if always or grad.any() else None
    is_pushed = always

    def noting(logprobs: Tensor, span: slice) -> Tensor:
        nonlocal is_pushed
        grad = gradient_of(logprobs, span)
        is_pushed = is_pushed or bool(grad.any())
        return grad

    inputs = _head_inputs(hidden, head, low_rank)
    logprobs, loss = FusedLoss.apply(targets, head.form, chunk, noting, *inputs)
    return logprobs, PendingBackward(loss, torch.ones_like(loss)) if is_pushed else None


def likeliest_tokens(
    hidden: Tensor,
    head: Head,
    count: int,
    chunk: int = HEAD_CHUNK,
    *,
    low_rank: LowRank | None = None,
) -> tuple[Tensor, Tensor]:
    """Logprobs float32 and ids int64 of the likeliest tokens, both [M, count], likeliest first."""
    logprobs = torch.empty((len(hidden), count), dtype=torch.float32, device=hidden.device)
    tokens = torch.empty((len(hidden), count), dtype=torch.int64, device=hidden.device)
    for span in spans(len(hidden), chunk):
        logits = head.logits(hidden[span], _cut(low_rank, span))
        best, tokens[span] = logits.topk(count, dim=-1)
        logprobs[span] = best - logits.logsumexp(-1, keepdim=True)
    return logprobs, tokens


def _recomputed_logprobs(
    hidden: Tensor, head: Head, targets: Tensor, chunk: int, low_rank: LowRank | None
) -> Tensor:
    """For a form whose derivative only autograd knows."""

    def logprobs(span: slice) -> Tensor:
        logits = head.logits(hidden[span], _cut(low_rank, span))
        return logits.log_softmax(-1).gather(-1, targets[span])

    chunks = [checkpoint(logprobs, span, use_reentrant=False) for span in spans(len(hidden), chunk)]
    return torch.cat(chunks)


def _cut(low_rank: LowRank | None, span: slice) -> LowRank | None:
    return None if low_rank is None else (low_rank[0][span], low_rank[1])


def _head_inputs(hidden: Tensor, head: Head, low_rank: LowRank | None) -> HeadInputs:
    x, b = low_rank if low_rank is not None else (None, None)
    return HeadInputs(hidden, head.weight, head.bias, x, b)
