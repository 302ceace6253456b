"""Weights that were just put in place score a text before anything is answered."""

from __future__ import annotations

import math

import numpy as np

from homefire.checkpoints.canary import canary_tokens, judge
from homefire.inference.engine.network import Adapter, Network, PrefillRow
from homefire.inference.engine.protocol import PromptScoring
from homefire.inference.engine.sampling_plan import SamplingPlan
from homefire.wire.errors import CanaryMismatch
from homefire.wire.internal import CanaryVerdict
from homefire.wire.manifest import Canary

_NOTHING = SamplingPlan.of([], [])


def prove(
    network: Network, canary: Canary | None, *, name: str, adapter: Adapter = None
) -> CanaryVerdict:
    """Raises CanaryMismatch; without a canary still when the weights give no number at all.

    Touches no slot and no block: sequences may be running.
    """
    if canary is not None:
        found = _score(network, canary.tokens, adapter)
        return judge(canary, found, compute_dtype=network.compute_dtype, name=name)
    tokens = canary_tokens(network.vocab_size, network.max_context_length)
    if not all(map(math.isfinite, _score(network, tokens, adapter))):
        raise CanaryMismatch(
            f"the weights of {name!r} give logprobs that are not finite",
            hint="the old weights serve on; look at the loss before this snapshot",
        )
    return CanaryVerdict.ABSENT


def _score(network: Network, tokens: tuple[int, ...], adapter: Adapter) -> list[float]:
    row = PrefillRow(tokens, (), adapter, PromptScoring(logprobs_from=1))
    return network.prefill([row], _NOTHING, np.empty(0)).scores[0].logprobs
