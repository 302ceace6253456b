"""Logits changed token by token before a draw: logit bias, repetition, presence and frequency penalties.

In this order, as vLLM has it, before temperature and truncation:

    logit += bias
    logit  = logit / repetition if logit > 0 else logit * repetition     tokens of the prompt or drawn
    logit -= frequency * times drawn + presence                          tokens drawn
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from homefire.inference.engine.protocol import Sampling

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Adjustments:
    """The entries of a batch's logits [B, V] that change; each names another one. Axis: n entries."""

    rows: Ints
    tokens: Ints
    biases: Floats
    repetitions: Floats
    """1 where off."""
    penalties: Floats
    """Of presence and frequency together."""


class AdjustedTokens:
    """One sequence's tokens whose logits change, as it goes on."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int]) -> None:
        self._sampling = sampling
        biases = dict(sampling.logit_bias)
        repeated = set(prompt) if sampling.repetition_penalty != 1 else set[int]()
        tokens = [*biases, *sorted(repeated - biases.keys())]
        self._count = len(tokens)
        self._place = {token: i for i, token in enumerate(tokens)}
        self._tokens = np.array(tokens, dtype=np.int64)
        self._biases = np.array([biases.get(token, 0.0) for token in tokens], dtype=np.float32)
        self._in_prompt = np.array([token in repeated for token in tokens], dtype=np.bool_)
        self._times_drawn = np.zeros(len(tokens), dtype=np.float32)

    def draw(self, token: int) -> None:
        """It was drawn once more."""
        if token not in self._place:
            self._append(token)
        self._times_drawn[self._place[token]] += 1

    def entries(self) -> tuple[Ints, Floats, Floats, Floats]:
        """Tokens, and the biases, repetitions and penalties of each."""
        sampling, count = self._sampling, self._count
        times_drawn = self._times_drawn[:count]
        is_drawn = times_drawn > 0
        repeats = is_drawn | self._in_prompt[:count]
        repetitions = np.where(repeats, np.float32(sampling.repetition_penalty), np.float32(1))
        penalties = np.float32(sampling.frequency_penalty) * times_drawn
        penalties += np.float32(sampling.presence_penalty) * is_drawn
        return self._tokens[:count], self._biases[:count], repetitions, penalties

    def _append(self, token: int) -> None:
        if self._count == len(self._tokens):
            size = max(16, self._count)
            self._tokens = np.pad(self._tokens, (0, size))
            self._biases = np.pad(self._biases, (0, size))
            self._in_prompt = np.pad(self._in_prompt, (0, size))
            self._times_drawn = np.pad(self._times_drawn, (0, size))
        self._tokens[self._count] = token
        self._place[token] = self._count
        self._count += 1


def adjustments_of(rows: Sequence[AdjustedTokens | None]) -> Adjustments | None:
    """Of a whole batch; None when nothing changes."""
    found = [(row, tokens.entries()) for row, tokens in enumerate(rows) if tokens is not None]
    if not found:
        return None
    return Adjustments(
        np.concatenate([np.full(len(entries[0]), row, dtype=np.int64) for row, entries in found]),
        np.concatenate([entries[0] for _, entries in found]),
        np.concatenate([entries[1] for _, entries in found]),
        np.concatenate([entries[2] for _, entries in found]),
        np.concatenate([entries[3] for _, entries in found]),
    )
