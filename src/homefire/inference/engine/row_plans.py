"""How the rows of one pass are drawn: one entry per sequence, in the order of their slots."""

from __future__ import annotations

from collections.abc import Sequence as Items

import numpy as np

from homefire.inference.engine.adjustments import Adjustments, adjustments_of
from homefire.inference.engine.sampling_plan import SamplingPlan, Uniforms
from homefire.inference.engine.sequence import Sequence


def plan_of(sequences: Items[Sequence]) -> SamplingPlan:
    return SamplingPlan.of(
        [sequence.request.sampling for sequence in sequences],
        [sequence.request.num_alternatives for sequence in sequences],
    )


def adjustments_for(sequences: Items[Sequence]) -> Adjustments | None:
    """Of this step: they change with every token."""
    return adjustments_of([sequence.adjusted for sequence in sequences])


def uniforms_of(sequences: Items[Sequence]) -> Uniforms:
    """The next number of each."""
    return np.array([sequence.random.random() for sequence in sequences], dtype=np.float64)
