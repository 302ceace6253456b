"""Rows packed end to end through the model, and logprobs of targets without full logits.

Axes: T tokens of all rows, M rows of hidden states, H hidden, V vocabulary, K targets per token,
r adapter rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from homefire.model.attention import PackedRows, attending
from homefire.model.head import PLAIN, Head, LowRank, ScaledLogits

if TYPE_CHECKING:
    from homefire.model.loading import LoadedModel

HEAD_CHUNK = 512
"""Tokens whose logits exist at once: 512 x 150k float32 logits are 0.3 GB."""


def packed_hidden(model: LoadedModel, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
    """tokens int [T], lengths summing to T -> [T, H], float32. Differentiable in the weights."""
    positions = torch.cat([torch.arange(length, device=tokens.device) for length in lengths])
    with attending(PackedRows(lengths)):
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
        x, b = low_rank if low_rank is not None else (None, None)
        logprobs = _TargetLogprobs.apply(
            hidden, head.weight, head.bias, columns, head.form, chunk, x, b
        )
    else:
        logprobs = _recomputed_logprobs(hidden, head, columns, chunk, low_rank)
    return logprobs if targets.dim() == 2 else logprobs[:, 0]


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
    for span in _spans(len(hidden), chunk):
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

    spans = _spans(len(hidden), chunk)
    return torch.cat([checkpoint(logprobs, span, use_reentrant=False) for span in spans])


class _TargetLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        form: ScaledLogits,
        chunk: int,
        x: Tensor | None,
        b: Tensor | None,
    ) -> Tensor:
        logprobs = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)
        normalizer = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        for span in _spans(len(hidden), chunk):
            logits = _logits(hidden, weight, bias, form, x, b, span)
            normalizer[span] = logits.logsumexp(-1)
            logprobs[span] = logits.gather(-1, targets[span]) - normalizer[span, None]
        ctx.save_for_backward(hidden, weight, bias, targets, normalizer, x, b)
        ctx.form, ctx.chunk = form, chunk
        return logprobs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        hidden, weight, bias, targets, normalizer, x, b = ctx.saved_tensors
        wants = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if wants[0] else None
        grad_weight = torch.zeros_like(weight) if wants[1] else None
        grad_bias = torch.zeros_like(bias) if wants[2] else None
        grad_x = torch.empty_like(x) if wants[6] else None
        grad_b = torch.zeros_like(b) if wants[7] else None
        for span in _spans(len(hidden), ctx.chunk):
            logits = _logits(hidden, weight, bias, ctx.form, x, b, span)
            slope = ctx.form.slope(logits)
            # d logprob_k / d logits = onehot(target_k) - softmax
            d = logits.sub_(normalizer[span, None]).exp_()
            d.mul_(-grad[span].sum(-1, keepdim=True))
            d.scatter_add_(-1, targets[span], grad[span])
            if ctx.form != PLAIN:
                d.mul_(slope)
            if grad_hidden is not None:
                grad_hidden[span] = d @ weight
            if grad_weight is not None:
                grad_weight.addmm_(d.t(), hidden[span])
            if grad_bias is not None:
                grad_bias.add_(d.sum(0))
            if grad_x is not None:
                grad_x[span] = d @ b
            if grad_b is not None:
                grad_b.addmm_(d.t(), x[span])
        return grad_hidden, grad_weight, grad_bias, None, None, None, grad_x, grad_b


def _spans(length: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, length)) for start in range(0, length, chunk)]


def _cut(low_rank: LowRank | None, span: slice) -> LowRank | None:
    return None if low_rank is None else (low_rank[0][span], low_rank[1])


def _logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    form: ScaledLogits,
    x: Tensor | None,
    b: Tensor | None,
    span: slice,
) -> Tensor:
    product = F.linear(hidden[span], weight, bias)
    if x is not None and b is not None:
        product.addmm_(x[span], b.t())
    return form.of(product.float())
