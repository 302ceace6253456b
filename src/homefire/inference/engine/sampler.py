"""Sampling a batch of rows on tensors: inverse of the cumulative distribution, one uniform per row.

One number per row replaces the B x V noise of Gumbel sampling (9 % of a small decode step when it was
measured), and makes a seeded row depend on its own number only.

Axes: B rows, V vocabulary, R truncated rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from homefire.inference.engine.adjustments import Adjustments
from homefire.inference.engine.protocol import Alternatives
from homefire.inference.engine.sampling_plan import Draws, SamplingPlan, Uniforms

NEVER = float("-inf")


def sample(logits_BV: Tensor, plan: SamplingPlan, uniforms: Uniforms) -> Draws:
    """uniforms float64 [B] in [0, 1) -> one token per row. Logits are not changed."""
    logprobs_BV = logits_BV.float().log_softmax(-1)
    sampling_BV = logprobs_BV if plan.is_plain else sampling_logprobs(logits_BV.float(), plan)
    tokens = inverse_cdf(sampling_BV, torch.from_numpy(uniforms).to(logits_BV.device))
    chosen = tokens[:, None]
    return Draws(
        tokens=tokens.tolist(),
        logprobs=logprobs_BV.gather(-1, chosen)[:, 0].tolist(),
        sampling_logprobs=sampling_BV.gather(-1, chosen)[:, 0].tolist(),
        alternatives=likeliest(logprobs_BV, plan.num_alternatives),
    )


def sampling_logprobs(logits_BV: Tensor, plan: SamplingPlan) -> Tensor:
    """Log-probabilities after adjustments, temperature and truncation; a greedy row has 0 at its one
    token. Logits float32, not changed."""
    device = logits_BV.device
    if plan.adjustments is not None:
        logits_BV = _adjusted(logits_BV, plan.adjustments)
    temperatures = torch.from_numpy(plan.temperatures).to(device)
    sampling_BV = (logits_BV / temperatures[:, None]).log_softmax(-1)
    if plan.any_truncated:
        rows = torch.from_numpy(plan.truncated).to(device).nonzero()[:, 0]
        sampling_BV[rows] = _truncated(sampling_BV[rows], plan, rows)
    if plan.any_greedy:
        rows = torch.from_numpy(plan.greedy).to(device).nonzero()[:, 0]
        sampling_BV[rows] = _certain(logits_BV[rows])
    return sampling_BV


def _adjusted(logits_BV: Tensor, adjustments: Adjustments) -> Tensor:
    rows, tokens, biases, repetitions, penalties = (
        torch.from_numpy(values).to(logits_BV.device)
        for values in (
            adjustments.rows,
            adjustments.tokens,
            adjustments.biases,
            adjustments.repetitions,
            adjustments.penalties,
        )
    )
    chosen = logits_BV[rows, tokens] + biases
    chosen = torch.where(chosen > 0, chosen / repetitions, chosen * repetitions) - penalties
    return logits_BV.index_put((rows, tokens), chosen)


def _truncated(logprobs_RV: Tensor, plan: SamplingPlan, rows: Tensor) -> Tensor:
    device = logprobs_RV.device
    top_ks, top_ps, min_ps = (
        torch.from_numpy(values).to(device)[rows, None]
        for values in (plan.top_ks, plan.top_ps, plan.min_ps)
    )
    ordered, order = logprobs_RV.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(ordered.shape[-1], device=device)
    ordered = ordered.masked_fill(rank >= top_ks, NEVER).log_softmax(-1)
    probabilities = ordered.exp()
    before = probabilities.double().cumsum(-1) - probabilities
    dropped = (before >= top_ps) | (probabilities < min_ps * probabilities[:, :1])
    dropped[:, 0] = False
    kept = ordered.masked_fill(dropped, NEVER).log_softmax(-1)
    return torch.full_like(kept, NEVER).scatter(-1, order, kept)


def _certain(logits_RV: Tensor) -> Tensor:
    best = logits_RV.argmax(-1, keepdim=True)
    return torch.full_like(logits_RV, NEVER).scatter_(-1, best, 0.0)


def inverse_cdf(logprobs_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    """The first token whose cumulative probability exceeds its row's uniform: int64 [B].

    The sum is float64, and the threshold stays below it, so a token of probability 0 is never drawn.
    """
    cumulative = logprobs_BV.exp().cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    threshold = torch.minimum(uniforms_B[:, None] * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, threshold, right=True)[:, 0]


def likeliest(logprobs_BV: Tensor, count: int) -> list[Alternatives]:
    """Per row the `count` likeliest tokens; nothing at all for 0."""
    if count == 0:
        return []
    values, tokens = logprobs_BV.topk(min(count, logprobs_BV.shape[-1]), dim=-1)
    return [
        list(zip(row_tokens, row_values, strict=True))
        for row_tokens, row_values in zip(tokens.tolist(), values.tolist(), strict=True)
    ]
