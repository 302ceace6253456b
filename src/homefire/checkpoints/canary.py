"""The canary: a fixed text that trainer and sampler both score, so that weights are known by their answers.

Digests prove the bytes in memory. The canary proves what is computed with them: a head that was not
refreshed, an adapter without its scale or a kernel that reads other memory answers otherwise.

    found ── further than the tolerance from what the manifest says ──▶ CanaryMismatch
      └── near it ── parent's further than ten tolerances away ──▶ pass, else inconclusive
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from homefire.wire.errors import CanaryMismatch
from homefire.wire.internal import CanaryVerdict
from homefire.wire.manifest import Canary

LENGTH = 32
TOLERANCES = {"float32": 1e-4, "float64": 1e-4}
"""Nats, the largest difference at any token. Trainer and sampler sum in another order: on CPU it came to 2e-6
for a Qwen3 of 33 M parameters (dev/LOG.md)."""
COARSE_TOLERANCE = 0.1
"""For every shorter dtype, whose kernels round differently; not measured on a GPU yet."""
_TELLS_APART = 10
"""Tolerances between a snapshot and its parent from which on a pass means that it is not the parent."""


def canary_tokens(vocab_size: int, max_context_length: int) -> tuple[int, ...]:
    """Spread over the vocabulary, none twice in a row; the same wherever it is asked."""
    length = min(LENGTH, max_context_length)
    return tuple((11 + 7 * i + 101 * i * i) % vocab_size for i in range(length))


def tolerance(*compute_dtypes: str) -> float:
    """Of the coarsest of the dtypes that are compared."""
    return max(TOLERANCES.get(dtype, COARSE_TOLERANCE) for dtype in compute_dtypes)


def judge(
    canary: Canary, found: Sequence[float], *, compute_dtype: str, name: str
) -> CanaryVerdict:
    """`found`: logprobs of the canary's tokens but the first, by the engine that loaded snapshot `name`.

    Raises CanaryMismatch, naming the snapshot and by how much it is off.
    """
    limit = tolerance(canary.compute_dtype, compute_dtype)
    parent = canary.parent_logprobs
    off = distance(found, canary.logprobs)
    if not off <= limit:
        likeness = ""
        if parent is not None and distance(found, parent) <= limit:
            likeness = "; they answer as the weights before it do"
        raise CanaryMismatch(
            f"the weights loaded for {name!r} give the canary logprobs that are off by {off:.2g},"
            f" where {limit:.2g} is allowed{likeness}",
            hint="the old weights serve on; save the snapshot again",
        )
    if parent is None or distance(canary.logprobs, parent) < _TELLS_APART * limit:
        return CanaryVerdict.INCONCLUSIVE
    return CanaryVerdict.PASS


def distance(a: Sequence[float], b: Sequence[float]) -> float:
    """The largest difference; infinite for other lengths or what is not finite."""
    if len(a) != len(b) or not all(map(math.isfinite, (*a, *b))):
        return math.inf
    return max((abs(x - y) for x, y in zip(a, b, strict=True)), default=0.0)
