"""Scores of a prompt's own positions, a chunk of logits at a time.

Axes: n positions of one chunk, K targets, D draws, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from homefire.inference.engine.network import PrefillRow, PromptScore
from homefire.inference.engine.protocol import Alternatives, PromptDraws, PromptScoring
from homefire.inference.engine.sampler import inverse_cdf, likeliest

_AT_ONCE = 256
"""Positions whose logits exist at once: 256 x 150k float32 logits are 0.15 GB."""


def score_prompt(row: PrefillRow, logits: Callable[[slice], Tensor]) -> PromptScore:
    """`logits(span)` -> [n, V], of what follows the span's positions: position p is predicted by p - 1."""
    scoring = row.scoring
    if scoring is None:
        return PromptScore()
    collected = _Collected(row.tokens, scoring)
    for start in range(collected.first, len(row.tokens), _AT_ONCE):
        end = min(start + _AT_ONCE, len(row.tokens))
        collected.add(start, logits(slice(start - 1, end - 1)).float().log_softmax(-1))
    return collected.score


class _Collected:
    def __init__(self, tokens: tuple[int, ...], scoring: PromptScoring) -> None:
        self._tokens = tokens
        self._scoring = scoring
        self._uniforms = _uniforms(scoring.draws, len(tokens) - 1)
        self._logprobs_from = len(tokens)
        self.score = PromptScore()
        if scoring.logprobs_from is not None:
            self._logprobs_from = max(scoring.logprobs_from, 1)
            if scoring.logprobs_from == 0:
                self.score.logprobs.append(0.0)
                self.score.alternatives.extend([[]] * bool(scoring.num_alternatives))
        self._targets_from = 1 + _leading_unasked(scoring.targets)
        self.score.target_logprobs.extend(
            [0.0] * len(row) for row in scoring.targets[: self._targets_from - 1]
        )

    @property
    def first(self) -> int:
        """The first position that anything is wanted of."""
        if self._scoring.draws is not None:
            return 1
        targets_from = self._targets_from if self._scoring.targets else len(self._tokens)
        return min(self._logprobs_from, targets_from)

    def add(self, start: int, logprobs_nV: Tensor) -> None:
        """Positions `start`, …"""
        end, score = start + len(logprobs_nV), self.score
        if (at := max(start, self._logprobs_from)) < end:
            wanted = logprobs_nV[at - start :]
            tokens = torch.tensor(self._tokens[at:end], device=wanted.device)
            score.logprobs.extend(wanted.gather(-1, tokens[:, None])[:, 0].tolist())
            score.alternatives.extend(likeliest(wanted, self._scoring.num_alternatives))
        if self._scoring.targets and (at := max(start, self._targets_from)) < end:
            rows = self._scoring.targets[at - 1 : end - 1]
            score.target_logprobs.extend(_of_targets(logprobs_nV[at - start :], rows))
        if self._scoring.draws is not None:
            uniforms = self._uniforms[start - 1 : end - 1]
            score.draws.extend(_drawn(logprobs_nV, self._scoring.draws.temperature, uniforms))


def _leading_unasked(targets: Sequence[Sequence[int]]) -> int:
    """Rows before the first that names an id."""
    asked = (i for i, row in enumerate(targets) if any(token >= 0 for token in row))
    return next(asked, len(targets))


def _of_targets(logprobs_nV: Tensor, rows: Sequence[tuple[int, ...]]) -> list[list[float]]:
    """0 where a row asks for nothing (-1). Rows may differ in length."""
    width = max((len(row) for row in rows), default=0)
    if width == 0:
        return [[] for _ in rows]
    padded = [[*row, *[-1] * (width - len(row))] for row in rows]
    ids_nK = torch.tensor(padded, device=logprobs_nV.device)
    found = logprobs_nV.gather(-1, ids_nK.clamp(min=0)).masked_fill(ids_nK < 0, 0.0)
    return [values[: len(row)] for values, row in zip(found.tolist(), rows, strict=True)]


def _uniforms(draws: PromptDraws | None, num_positions: int) -> np.ndarray:
    if draws is None:
        return np.empty((num_positions, 0))
    return np.random.default_rng(draws.seed).random((num_positions, draws.count))


def _drawn(logprobs_nV: Tensor, temperature: float, uniforms: np.ndarray) -> list[Alternatives]:
    """Tokens drawn at the temperature, with the model's own logprobs of them."""
    if temperature == 0:
        best = logprobs_nV.argmax(-1, keepdim=True)
        tokens_nD = best.expand(-1, uniforms.shape[1])
    else:
        tempered = (logprobs_nV / temperature).log_softmax(-1)
        columns = torch.from_numpy(uniforms).to(logprobs_nV.device).t()
        tokens_nD = torch.stack([inverse_cdf(tempered, column) for column in columns], dim=1)
    found = logprobs_nV.gather(-1, tokens_nD)
    return [
        list(zip(tokens, logprobs, strict=True))
        for tokens, logprobs in zip(tokens_nD.tolist(), found.tolist(), strict=True)
    ]
