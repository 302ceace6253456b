"""The losses of the Tinker protocol, as functions of the targets' logprobs alone.

A loss gives its value and its derivative with respect to each logprob, in float64; an engine only
has to push that derivative through the network. All are sums over tokens, never means (tinker.md §4.3,
fireworks.md §3.5). With p the learner's logprob of a target, q the behaviour policy's, A the
advantage, r = exp(p - q), and sg what no gradient flows through:

    cross_entropy        sum of  -p * weight                        weights any real, [T, K]
    importance_sampling  sum of  -r * A
    ppo                  sum of  -min(r * A, clamp(r, low, high) * A)
    cispo                sum of  -sg(clamp(r, low, high)) * p * A
    dro                  sum of  -(p * A - beta / 2 * (p - q)^2)    on every token, also where A is 0
    gspo                 ppo with r = sg(s) * exp(p - sg(p)), s the row's exp(mean(p - q))
    dapo                 ppo, and with eps_clip_c = c: where A < 0, at most -c * A

gspo is its token variant (arXiv:2507.18071 §4.3); the mean is over the tokens that
`sequence_ratio_mask` marks, without one over those whose advantage is not 0. dapo is the clipped
surrogate of arXiv:2503.14476 with the dual clip of arXiv:1912.09729. `ratio_log_cap` clamps p - q
to [-cap, cap] before exp, `seq_ratio_log_cap` log s from above; a clamped ratio has no gradient.

Tokens with weight or advantage 0 are masked, except in dro: whatever else they hold (NaN, -inf)
does not count.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from homefire.trainer.engine.batch import Batch
from homefire.trainer.engine.network import Float32
from homefire.wire.errors import InvalidArgument, LengthMismatch, NonFiniteGradient
from homefire.wire.losses import (
    BETA,
    CLIP_HIGH,
    CLIP_LOW,
    DEFAULT_THRESHOLDS,
    DUAL_CLIP,
    LOSSES,
    RATIO_LOG_CAP,
    SEQ_RATIO_LOG_CAP,
    SEQUENCE_RATIO_MASK,
    Config,
    loss_definition,
    require_threshold,
)

Float64 = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


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


@dataclass(frozen=True)
class Ratio:
    """The importance ratio of each token; all [T, 1]."""

    value: Float64
    slope: Float64
    """d ratio / d p: the ratio itself, or 0 where its logarithm was capped."""
    advantages: Float64


def loss_function(name: str, config: Config) -> Loss:
    """The loss of that name, its config checked."""
    loss_definition(name, config)
    return _LOSSES[name](config)


def is_per_token(name: str) -> bool:
    """Whether the derivative at a token depends on nothing but that token."""
    return name not in _LOSSES_OF_ROWS


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
            f" {batch.place_in_row(token)} (logprob {logprobs[token, k]})",
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


# The losses ------------------------------------------------------------------------------------


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
        ratio = _token_ratio(logprobs, batch, config)
        advantages = ratio.advantages
        value, gradient = -ratio.value * advantages, -ratio.slope * advantages
        return LossTerms(value, gradient, _ratio_metrics(ratio))

    return loss


def _ppo(config: Config) -> Loss:
    def loss(logprobs: Float64, batch: Batch) -> LossTerms:
        ratio = _token_ratio(logprobs, batch, config)
        return _clipped_surrogate(ratio, *_thresholds("ppo", config, batch))

    return loss


def _cispo(config: Config) -> Loss:
    def loss(logprobs: Float64, batch: Batch) -> LossTerms:
        ratio = _token_ratio(logprobs, batch, config)
        clipped = np.clip(ratio.value, *_thresholds("cispo", config, batch))
        gradient = -clipped * ratio.advantages
        value = np.where(ratio.advantages != 0, gradient * logprobs, 0.0)
        diagnostics = _ratio_metrics(ratio) | _clip_metric(clipped != ratio.value, ratio)
        return LossTerms(value, gradient, diagnostics)

    return loss


def _dro(config: Config) -> Loss:
    beta = float(config[BETA])

    def loss(logprobs: Float64, batch: Batch) -> LossTerms:
        old, advantages = _policy_columns(logprobs, batch)
        distance = logprobs - old
        penalty = beta / 2 * distance * distance
        value = penalty - logprobs * advantages
        gradient = beta * distance - advantages
        return LossTerms(value, gradient, {"penalty:sum": float(penalty.sum())})

    return loss


def _gspo(config: Config) -> Loss:
    def loss(logprobs: Float64, batch: Batch) -> LossTerms:
        ratio = _sequence_ratio(logprobs, batch, config)
        return _clipped_surrogate(ratio, *_thresholds("gspo", config, batch))

    return loss


def _dapo(config: Config) -> Loss:
    dual_clip = float(config.get(DUAL_CLIP, math.inf))

    def loss(logprobs: Float64, batch: Batch) -> LossTerms:
        ratio = _token_ratio(logprobs, batch, config)
        terms = _clipped_surrogate(ratio, *_thresholds("dapo", config, batch))
        if math.isinf(dual_clip):
            return terms
        ceiling = -dual_clip * ratio.advantages
        capped = (ratio.advantages < 0) & (ceiling < terms.value)
        diagnostics = {
            **terms.diagnostics,
            "dual_clip_fraction:mean": _mean(capped, where=ratio.advantages != 0),
        }
        value = np.where(capped, ceiling, terms.value)
        return LossTerms(value, np.where(capped, 0.0, terms.gradient), diagnostics)

    return loss


def _clipped_surrogate(ratio: Ratio, low: float | Float64, high: float | Float64) -> LossTerms:
    """-min(r A, clamp(r, low, high) A)."""
    advantages = ratio.advantages
    plain, clipped = ratio.value * advantages, np.clip(ratio.value, low, high) * advantages
    bound = clipped < plain
    diagnostics = _ratio_metrics(ratio) | _clip_metric(bound, ratio)
    # The clipped branch wins only outside the bounds, where clamp is constant.
    gradient = np.where(bound, 0.0, -ratio.slope * advantages)
    return LossTerms(-np.minimum(plain, clipped), gradient, diagnostics)


# What they are made of -------------------------------------------------------------------------


def _token_ratio(logprobs: Float64, batch: Batch, config: Config) -> Ratio:
    """exp(p - q); 1 on masked tokens."""
    old, advantages = _policy_columns(logprobs, batch)
    difference = np.where(advantages != 0, logprobs - old, 0.0)
    cap = float(config.get(RATIO_LOG_CAP, math.inf))
    ratio = np.exp(np.clip(difference, -cap, cap))
    return Ratio(ratio, np.where(np.abs(difference) <= cap, ratio, 0.0), advantages)


def _sequence_ratio(logprobs: Float64, batch: Batch, config: Config) -> Ratio:
    """Every token of a row carries exp of the mean of p - q over the row's marked tokens."""
    old, advantages = _policy_columns(logprobs, batch)
    marked = advantages != 0
    if SEQUENCE_RATIO_MASK in batch.inputs:
        marked = _column(batch, SEQUENCE_RATIO_MASK) != 0
    _check_marked(marked, advantages, batch)
    difference = np.where(marked, logprobs - old, 0.0)
    means = np.concatenate(
        [
            np.full((row.stop - row.start, 1), difference[row].sum() / max(1, marked[row].sum()))
            for row in batch.rows()
        ]
    )
    cap = float(config.get(SEQ_RATIO_LOG_CAP, math.inf))
    ratio = np.exp(np.minimum(means, cap))
    return Ratio(ratio, np.where(means <= cap, ratio, 0.0), advantages)


def _check_marked(marked: Bools, advantages: Float64, batch: Batch) -> None:
    for index, row in enumerate(batch.rows()):
        if advantages[row].any() and not marked[row].any():
            raise InvalidArgument(
                f"row {batch.row_ids[index]} has advantages, but its {SEQUENCE_RATIO_MASK} marks"
                " no token",
                hint="mark the sampled tokens with 1",
                field=SEQUENCE_RATIO_MASK,
            )


def _policy_columns(logprobs: Float64, batch: Batch) -> tuple[Float64, Float64]:
    """q and A, both [T, 1]."""
    old, advantages = (_column(batch, name) for name in ("logprobs", "advantages"))
    if logprobs.shape[-1] != 1:
        raise LengthMismatch(
            f"this loss takes one target per token, not {logprobs.shape[-1]}", field="target_tokens"
        )
    return old, advantages


def _column(batch: Batch, name: str) -> Float64:
    if name not in batch.inputs:
        raise InvalidArgument(f"loss_fn_inputs lack {name!r}", field=name)
    column = batch.inputs[name].astype(np.float64)
    if column.shape[-1] != 1:
        raise LengthMismatch(f"{name} has {column.shape[-1]} values per token, not 1", field=name)
    return column


def _thresholds(name: str, config: Config, batch: Batch) -> tuple[float | Float64, float | Float64]:
    """Low and high bounds of the ratio; those of the tokens win over the config's."""

    def bound(key: str) -> float | Float64:
        if key in batch.inputs:
            return _column(batch, key)
        require_threshold(name, LOSSES[name], key, config)
        return float(config.get(key, DEFAULT_THRESHOLDS[key]))

    low, high = bound(CLIP_LOW), bound(CLIP_HIGH)
    if np.any(np.asarray(low) > np.asarray(high)):
        raise InvalidArgument(
            f"{CLIP_LOW} is above {CLIP_HIGH}",
            hint="thresholds bound the ratio itself, e.g. 0.8 and 1.2",
            field=CLIP_LOW,
        )
    return low, high


def _clip_metric(clipped: Bools, ratio: Ratio) -> dict[str, float]:
    return {"clip_fraction:mean": _mean(clipped, where=ratio.advantages != 0)}


def _ratio_metrics(ratio: Ratio) -> dict[str, float]:
    counted = ratio.advantages != 0
    return {
        "ratio:mean": _mean(ratio.value, where=counted),
        "ratio:max": float(ratio.value.max()),
        "ratio:min": float(ratio.value.min()),
    }


def _mean(values: npt.NDArray[np.generic], *, where: Bools) -> float:
    return float(values[where].astype(np.float64).mean()) if where.any() else 0.0


_LOSSES: dict[str, Callable[[Config], Loss]] = {
    "cross_entropy": _cross_entropy,
    "importance_sampling": _importance_sampling,
    "ppo": _ppo,
    "cispo": _cispo,
    "dro": _dro,
    "gspo": _gspo,
    "dapo": _dapo,
}

_LOSSES_OF_ROWS = {"gspo"}
