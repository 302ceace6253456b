"""The losses of the protocol: what each takes, and which are refused by name.

A front checks a request against these definitions, an engine computes by them
(`homefire.trainer.engine.losses` has the formulas). Sources: tinker.md §4.3, fireworks.md §3.5.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from homefire.wire.errors import InvalidArgument, UnknownLoss, Unsupported

Config = Mapping[str, float | str]

CLIP_LOW = "clip_low_threshold"
CLIP_HIGH = "clip_high_threshold"
CLIP_THRESHOLDS = (CLIP_LOW, CLIP_HIGH)
"""Bounds of the ratio itself, 0.8 and not 0.2: from the config, or per token from the datum."""
DEFAULT_THRESHOLDS = {CLIP_LOW: 0.8, CLIP_HIGH: 1.2}
"""Of ppo and cispo. The defaults of gspo and dapo are not public: there they must be given."""
RATIO_LOG_CAP = "ratio_log_cap"
SEQ_RATIO_LOG_CAP = "seq_ratio_log_cap"
SEQUENCE_RATIO_MASK = "sequence_ratio_mask"
BETA = "beta"
DUAL_CLIP = "eps_clip_c"


@dataclass(frozen=True)
class LossDefinition:
    """What a loss takes per datum beside `target_tokens`, and in its config."""

    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    config: tuple[str, ...] = ()
    required_config: tuple[str, ...] = ()
    """Keys of `config` without a default; thresholds may come per token instead."""
    takes_any_input: bool = False
    """Unknown inputs are ignored: tinker 0.15 sends all a datum has with its custom losses."""
    takes_many_targets: bool = False
    """[N, K] targets as well as [N]."""

    def thresholds_must_be_given(self) -> bool:
        return any(name in self.required_config for name in CLIP_THRESHOLDS)


_RATIO = ("logprobs", "advantages")
LOSSES: dict[str, LossDefinition] = {
    "cross_entropy": LossDefinition(
        optional=("weights",), takes_any_input=True, takes_many_targets=True
    ),
    "importance_sampling": LossDefinition(required=_RATIO, config=(RATIO_LOG_CAP,)),
    "ppo": LossDefinition(
        required=_RATIO, optional=CLIP_THRESHOLDS, config=(*CLIP_THRESHOLDS, RATIO_LOG_CAP)
    ),
    "cispo": LossDefinition(
        required=_RATIO, optional=CLIP_THRESHOLDS, config=(*CLIP_THRESHOLDS, RATIO_LOG_CAP)
    ),
    "dro": LossDefinition(required=_RATIO, config=(BETA,), required_config=(BETA,)),
    "gspo": LossDefinition(
        required=_RATIO,
        optional=(*CLIP_THRESHOLDS, SEQUENCE_RATIO_MASK),
        config=(*CLIP_THRESHOLDS, SEQ_RATIO_LOG_CAP),
        required_config=CLIP_THRESHOLDS,
    ),
    "dapo": LossDefinition(
        required=_RATIO,
        optional=CLIP_THRESHOLDS,
        config=(*CLIP_THRESHOLDS, RATIO_LOG_CAP, DUAL_CLIP),
        required_config=CLIP_THRESHOLDS,
    ),
}

_REFUSED = {
    "stable_reinforce": "what servers compute under that name is not published",
    "dppo": "what servers compute under that name is not published",
    "reinforce": "what servers compute under that name is not published",
    "custom": "losses are not run on the server",
}
"""Losses of the protocol that are not computed, and why."""

_AT_LEAST = {CLIP_LOW: 0.0, CLIP_HIGH: 0.0, BETA: 0.0, RATIO_LOG_CAP: 0.0, SEQ_RATIO_LOG_CAP: 0.0}


def loss_definition(name: str, config: Config) -> LossDefinition:
    """The loss of that name with its config checked, or what is wrong with either as a UserError.

    Required thresholds are not demanded here: the datums may hold them (`require_threshold`).
    """
    loss = LOSSES.get(name)
    known = ", ".join(LOSSES)
    if name in _REFUSED:
        raise Unsupported(
            f"loss_fn {name!r} is not supported: {_REFUSED[name]}",
            hint=f"use {known}, or forward_backward_custom",
            field="loss_fn",
        )
    if loss is None:
        raise UnknownLoss(f"loss_fn {name!r} is unknown", hint=f"use {known}", field="loss_fn")
    for key, value in config.items():
        _check_value(name, loss, key, value)
    for key in loss.required_config:
        if key not in config and key not in CLIP_THRESHOLDS:
            raise _missing(name, key)
    return loss


def require_threshold(name: str, loss: LossDefinition, key: str, config: Config) -> None:
    """For a threshold that some datum lacks: InvalidArgument when nothing else gives it."""
    if key in loss.required_config and key not in config:
        raise _missing(name, key)


def _missing(name: str, key: str) -> InvalidArgument:
    return InvalidArgument(
        f"{name} needs loss_fn_config {key!r}: it has no default that is public",
        hint=f"send {key} in loss_fn_config",
        field=f"loss_fn_config.{key}",
    )


def _check_value(name: str, loss: LossDefinition, key: str, value: float | str) -> None:
    field = f"loss_fn_config.{key}"
    if key not in loss.config:
        raise InvalidArgument(
            f"loss_fn_config has {key!r}, which {name} does not take",
            hint=f"it takes {', '.join(loss.config) or 'nothing'}",
            field=field,
        )
    if isinstance(value, str) or not math.isfinite(value):
        raise InvalidArgument(f"{field} is {value!r}", hint="use a finite number", field=field)
    if value < _AT_LEAST.get(key, -math.inf):
        hint = f"use {_AT_LEAST[key]:g} or more"
        if key in CLIP_THRESHOLDS:
            hint = "thresholds bound the ratio itself, e.g. 0.8 and 1.2"
        raise InvalidArgument(f"{field} is {value:g}", hint=hint, field=field)
    if key == DUAL_CLIP and value <= 1:
        raise InvalidArgument(f"{field} is {value:g}", hint="use more than 1", field=field)
