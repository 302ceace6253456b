"""How a whole batch is sampled, laid out as arrays once per change of the batch; adjustments, once a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from homefire.inference.engine.adjustments import Adjustments
from homefire.inference.engine.protocol import Alternatives, Sampling

Floats = npt.NDArray[np.float32]
Uniforms = npt.NDArray[np.float64]
"""One number in [0, 1) per row: all the randomness of a draw."""


@dataclass(frozen=True)
class SamplingPlan:
    """One entry per row of the logits, in the order of the slots. Axis: B rows."""

    samplings: tuple[Sampling, ...]
    temperatures: Floats
    """[B]; 1 where greedy, so that dividing is safe."""
    greedy: npt.NDArray[np.bool_]
    truncated: npt.NDArray[np.bool_]
    """Rows of which top_k, top_p or min_p cut something off."""
    top_ps: Floats
    """2 where off: a cumulative sum may exceed 1 by rounding."""
    top_ks: npt.NDArray[np.int64]
    """At least 1; the largest int64 where off."""
    min_ps: Floats
    num_alternatives: int
    """The most that any row wants."""
    adjustments: Adjustments | None = None

    @classmethod
    def of(cls, samplings: Sequence[Sampling], num_alternatives: Sequence[int]) -> SamplingPlan:
        greedy = np.array([sampling.temperature == 0 for sampling in samplings], dtype=np.bool_)
        truncates = np.array([sampling.truncates for sampling in samplings], dtype=np.bool_)
        off = np.iinfo(np.int64).max
        return cls(
            samplings=tuple(samplings),
            temperatures=np.array([s.temperature or 1.0 for s in samplings], dtype=np.float32),
            greedy=greedy,
            truncated=truncates & ~greedy,
            top_ps=np.array([s.top_p if s.top_p < 1 else 2.0 for s in samplings], dtype=np.float32),
            top_ks=np.array([s.top_k or off for s in samplings], dtype=np.int64),
            min_ps=np.array([s.min_p for s in samplings], dtype=np.float32),
            num_alternatives=max(num_alternatives, default=0),
        )

    def adjusted(self, adjustments: Adjustments | None) -> SamplingPlan:
        """For one step: they change with every token."""
        return self if adjustments is None else replace(self, adjustments=adjustments)

    @property
    def any_greedy(self) -> bool:
        return bool(self.greedy.any())

    @property
    def any_truncated(self) -> bool:
        return bool(self.truncated.any())

    @property
    def is_plain(self) -> bool:
        """Every row is drawn from the model's own distribution."""
        is_tempered = not bool((self.temperatures == 1).all())
        is_adjusted = self.adjustments is not None
        return not (is_tempered or is_adjusted or self.any_greedy or self.any_truncated)


@dataclass(frozen=True, slots=True)
class Draws:
    """One token per row, and how likely it was. Lists of B."""

    tokens: list[int]
    logprobs: list[float]
    sampling_logprobs: list[float]
    alternatives: list[Alternatives]
    """Empty when nobody asked; else the plan's `num_alternatives` per row."""


NO_DRAWS = Draws([], [], [], [])
"""Of no rows."""
