"""Weights that were just put in place score the canary of their manifest before anything is answered."""

from __future__ import annotations

import numpy as np

from homefire.checkpoints.canary import judge
from homefire.inference.engine.network import Adapter, Network, PrefillRow
from homefire.inference.engine.protocol import PromptScoring
from homefire.inference.engine.sampling_plan import SamplingPlan
from homefire.wire.internal import CanaryVerdict
from homefire.wire.manifest import Canary

_NOTHING = SamplingPlan.of([], [])


def prove(
    network: Network, canary: Canary | None, *, name: str, adapter: Adapter = None
) -> CanaryVerdict:
    """Raises CanaryMismatch. Touches no slot and no block: sequences may be running."""
    if canary is None:
        return CanaryVerdict.ABSENT
    row = PrefillRow(canary.tokens, (), adapter, PromptScoring(logprobs_from=1))
    result = network.prefill([row], _NOTHING, np.empty(0))
    return judge(canary, result.scores[0].logprobs, compute_dtype=network.compute_dtype, name=name)
