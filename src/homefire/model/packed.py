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

from homefire.model.attention import PackedRows, attending

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
    return target_logprobs(hidden, model.head_weight, targets)


def target_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    chunk: int = HEAD_CHUNK,
    *,
    low_rank: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """log softmax(hidden @ weight.T)[targets], `chunk` tokens at a time.

    hidden [M, H], weight [V, H], targets int64 [M] or [M, K] -> float32 of the targets' shape.
    `low_rank` (x [M, r], b [V, r]) adds x @ b.T to the logits: an adapter on the head.
    Backward recomputes each chunk's logits, so no tensor of M x V outlives a chunk.
    """
    columns = targets if targets.dim() == 2 else targets[:, None]
    x, b = low_rank if low_rank is not None else (None, None)
    logprobs = _TargetLogprobs.apply(hidden, weight, columns, chunk, x, b)
    return logprobs if targets.dim() == 2 else logprobs[:, 0]


def likeliest_tokens(
    hidden: Tensor,
    weight: Tensor,
    count: int,
    chunk: int = HEAD_CHUNK,
    *,
    low_rank: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Logprobs float32 and ids int64 of the likeliest tokens, both [M, count], likeliest first."""
    x, b = low_rank if low_rank is not None else (None, None)
    logprobs = torch.empty((len(hidden), count), dtype=torch.float32, device=hidden.device)
    tokens = torch.empty((len(hidden), count), dtype=torch.int64, device=hidden.device)
    for span in _spans(len(hidden), chunk):
        logits = _logits(hidden, weight, x, b, span)
        best, tokens[span] = logits.topk(count, dim=-1)
        logprobs[span] = best - logits.logsumexp(-1, keepdim=True)
    return logprobs, tokens


class _TargetLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        chunk: int,
        x: Tensor | None,
        b: Tensor | None,
    ) -> Tensor:
        logprobs = torch.empty(targets.shape, dtype=torch.float32, device=hidden.device)
        normalizer = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        for span in _spans(len(hidden), chunk):
            logits = _logits(hidden, weight, x, b, span)
            normalizer[span] = logits.logsumexp(-1)
            logprobs[span] = logits.gather(-1, targets[span]) - normalizer[span, None]
        ctx.save_for_backward(hidden, weight, targets, normalizer, x, b)
        ctx.chunk = chunk
        return logprobs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        hidden, weight, targets, normalizer, x, b = ctx.saved_tensors
        wants = ctx.needs_input_grad
        grad_hidden = torch.empty_like(hidden) if wants[0] else None
        grad_weight = torch.zeros_like(weight) if wants[1] else None
        grad_x = torch.empty_like(x) if wants[4] else None
        grad_b = torch.zeros_like(b) if wants[5] else None
        for span in _spans(len(hidden), ctx.chunk):
            logits = _logits(hidden, weight, x, b, span)
            # d logprob_k / d logits = onehot(target_k) - softmax
            d = logits.sub_(normalizer[span, None]).exp_()
            d.mul_(-grad[span].sum(-1, keepdim=True))
            d.scatter_add_(-1, targets[span], grad[span])
            if grad_hidden is not None:
                grad_hidden[span] = d @ weight
            if grad_weight is not None:
                grad_weight.addmm_(d.t(), hidden[span])
            if grad_x is not None:
                grad_x[span] = d @ b
            if grad_b is not None:
                grad_b.addmm_(d.t(), x[span])
        return grad_hidden, grad_weight, None, None, grad_x, grad_b


def _spans(length: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, length)) for start in range(0, length, chunk)]


def _logits(
    hidden: Tensor, weight: Tensor, x: Tensor | None, b: Tensor | None, span: slice
) -> Tensor:
    logits = F.linear(hidden[span], weight)
    if x is not None and b is not None:
        logits.addmm_(x[span], b.t())
    return logits.float()
