"""The losses of the Tinker protocol, as functions of the targets' logprobs alone.

A loss gives its value and its derivative with respect to each logprob, in float64; an engine only
has to push that derivative through the network. All are sums over tokens, never means (tinker.md §4.3).
With p the learner's logprob of a target, q the behaviour policy's, A the advantage:

    cross_entropy        sum of  -p * weight                       weights any real, [T, K]
    importance_sampling  sum of  -exp(p - q) * A
    ppo                  sum of  -min(r * A, clamp(r, low, high) * A),   r = exp(p - q)

Tokens with weight or advantage 0 are masked: whatever else they hold (NaN, -inf) does not count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from homefire.trainer.engine.batch import Batch
from homefire.trainer.engine.network import Float32
from homefire.wire.errors import (
    InvalidArgument,
    LengthMismatch,
    NonFiniteGradient,
    UnknownLoss,
    Unsupported,
)

Float64 = npt.NDArray[np.float64]
Config = Mapping[str, float | str]

CLIP_LOW, CLIP_HIGH = 0.8, 1.2
"""ppo's ratio bounds when neither the config nor the rows give any."""
_THRESHOLDS = ("clip_low_threshold", "clip_high_threshold")
_LATER = ("cispo", "custom", "dapo", "dppo", "dro", "gspo", "reinforce", "stable_reinforce")
_FORWARD_EXTRAS = (
    "num_extra_negatives",
    "num_queries",
    "output",
    "pooling",
    "temperature",
    "top_k",
)


@dataclass(frozen=True)
class LossTerms:
    """A loss over some tokens."""

    value: Float64
    """[T, K]; the loss is the sum."""
    gradient: Float64
    """[T, K]: d loss / d logprob."""
    diagnostics: dict[str, float] = field(default_factory=dict[str, float])
    """Metrics beside the loss; each key ends in its reduction, e.g. `ratio:mean`."""


class Loss(Protocol):
    def __call__(self, logprobs: Float64, batch: Batch) -> LossTerms: ...


def loss_function(name: str, config: Config) -> Loss:
    """The loss of that name, its config checked."""
    if name not in _LOSSES:
        known = ", ".join(_LOSSES)
        if name in _LATER:
            raise Unsupported(f"loss_fn {name!r} is not supported yet", hint=f"use one of {known}")
        raise UnknownLoss(
            f"loss_fn {name!r} is unknown", hint=f"use one of {known}", field="loss_fn"
        )
    build, keys = _LOSSES[name]
    for key in config.keys() - set(keys):
        if key in _FORWARD_EXTRAS:
            raise Unsupported(f"loss_fn_config {key!r} is not supported yet", field=key)
        raise InvalidArgument(
            f"loss_fn_config {key!r} is unknown for {name}",
            hint=f"known: {', '.join(keys) or 'none'}",
            field="loss_fn_config",
        )
    return build(config)


def evaluate(loss: Loss, logprobs: Float32, batch: Batch) -> LossTerms:
    """`loss` on these rows; NonFiniteGradient names the first row whose terms are NaN or infinite."""
    with np.errstate(over="ignore", invalid="ignore"):
        terms = loss(logprobs.astype(np.float64), batch)
        finite = np.isfinite(terms.value) & np.isfinite(terms.gradient.astype(np.float32))
    broken = np.argwhere(~finite)
    if len(broken):
        token, k = (int(index) for index in broken[0])
        row = batch.row_of(token)
        raise NonFiniteGradient(
            f"the loss of row {batch.row_ids[row]} is {terms.value[token, k]} at token"
            f" {token - batch.rows()[row].start} (logprob {logprobs[token, k]})",
            hint="nothing was accumulated; check the logprobs, advantages and weights of that row",
        )
    return terms


def metrics(terms: LossTerms) -> dict[str, float]:
    """What a client sees of a loss. Every key carries its reduction over chunks."""
    counted = (terms.gradient != 0).any(-1)
    return {
        "loss:sum": float(terms.value.sum()),
        "tokens:sum": float(len(counted)),
        "loss_tokens:sum": float(counted.sum()),
        **terms.diagnostics,
    }


def _cross_entropy(config: Config) -> Loss:
    def loss(logprobs: Float64, batch: Batch) -> LossTerms:
        weights = batch.inputs.get("weights", np.ones_like(logprobs)).astype(np.float64)
        if weights.shape != logprobs.shape:
            raise LengthMismatch(
                f"weights have shape {list(weights.shape)}, target_tokens {list(logprobs.shape)}",
                field="weights",
            )
        value = np.where(weights != 0, -logprobs * weights, 0.0)
        return LossTerms(value, -weights)

    return loss


def _importance_sampling(config: Config) -> Loss:
    def loss(logprobs: Float64, batch: Batch) -> LossTerms:
        ratio, advantages = _ratio(logprobs, batch)
        value = -ratio * advantages
        return LossTerms(value, value, _ratio_metrics(ratio, advantages))

    return loss


def _ppo(config: Config) -> Loss:
    thresholds = {key: _number(config, key) for key in _THRESHOLDS if key in config}

    def loss(logprobs: Float64, batch: Batch) -> LossTerms:
        ratio, advantages = _ratio(logprobs, batch)
        low = _threshold(thresholds, batch, _THRESHOLDS[0], CLIP_LOW)
        high = _threshold(thresholds, batch, _THRESHOLDS[1], CLIP_HIGH)
        plain, clipped = ratio * advantages, np.clip(ratio, low, high) * advantages
        bound = clipped < plain
        diagnostics = _ratio_metrics(ratio, advantages)
        diagnostics["clip_fraction:mean"] = _mean(bound, where=advantages != 0)
        # The clipped branch wins only outside the bounds, where clamp is constant.
        return LossTerms(-np.minimum(plain, clipped), np.where(bound, 0.0, -plain), diagnostics)

    return loss


def _ratio(logprobs: Float64, batch: Batch) -> tuple[Float64, Float64]:
    """exp(p - q) and A, both [T, 1]; the ratio of a masked token is 1."""
    old, advantages = (_column(batch, name) for name in ("logprobs", "advantages"))
    if logprobs.shape[-1] != 1:
        raise LengthMismatch(
            f"this loss takes one target per token, not {logprobs.shape[-1]}", field="target_tokens"
        )
    return np.exp(np.where(advantages != 0, logprobs - old, 0.0)), advantages


def _column(batch: Batch, name: str) -> Float64:
    if name not in batch.inputs:
        raise InvalidArgument(f"loss_fn_inputs lack {name!r}", field=name)
    column = batch.inputs[name].astype(np.float64)
    if column.shape[-1] != 1:
        raise LengthMismatch(f"{name} has {column.shape[-1]} values per token, not 1", field=name)
    return column


def _threshold(
    config: Mapping[str, float], batch: Batch, name: str, default: float
) -> float | Float64:
    """Per-token bounds win over the config's."""
    return _column(batch, name) if name in batch.inputs else config.get(name, default)


def _number(config: Config, key: str) -> float:
    value = config[key]
    if isinstance(value, str):
        raise InvalidArgument(f"loss_fn_config {key!r} must be a number, not {value!r}", field=key)
    return float(value)


def _ratio_metrics(ratio: Float64, advantages: Float64) -> dict[str, float]:
    counted = advantages != 0
    return {
        "ratio:mean": _mean(ratio, where=counted),
        "ratio:max": float(ratio.max()),
        "ratio:min": float(ratio.min()),
    }


def _mean(values: npt.NDArray[np.generic], *, where: npt.NDArray[np.bool_]) -> float:
    return float(values[where].astype(np.float64).mean()) if where.any() else 0.0


_LOSSES = {
    "cross_entropy": (_cross_entropy, ()),
    "importance_sampling": (_importance_sampling, ()),
    "ppo": (_ppo, _THRESHOLDS),
}
"""How each loss is built, and the config keys that it knows."""

KNOWN_LOSSES = tuple(_LOSSES)
