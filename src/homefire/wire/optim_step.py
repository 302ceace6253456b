"""POST optim_step: AdamW's parameters where any client puts them, and nothing else beside them."""

from __future__ import annotations

from typing import Any

import msgspec

from homefire.wire.errors import InvalidArgument, Unsupported


class AdamFields(msgspec.Struct, frozen=True):
    """`adam_params`, or `optimizer_params` with a `type`; see `adam_fields`."""

    type: str = "adamw"
    learning_rate: float | None = None
    beta1: float | None = None
    beta2: float | None = None
    eps: float | None = None
    weight_decay: float | None = None
    grad_clip_norm: float | None = None
    emit_grad_norm_metrics: bool | str | None = None
    grad_accumulation_normalization: str | None = None


class OptimStepRequest(msgspec.Struct, frozen=True):
    model_id: str
    seq_id: int
    adam_params: dict[str, Any] | None = None
    optimizer_params: dict[str, Any] | None = None
    grad_accumulation_normalization: str | None = None


def adam_fields(request: OptimStepRequest) -> AdamFields:
    """What a step asks of AdamW. Unsupported for another optimizer, InvalidArgument for a field that
    AdamW does not have: ignoring it would be another step than the one that was meant."""
    where = "adam_params" if request.optimizer_params is None else "optimizer_params"
    given = getattr(request, where) or {}
    if (kind := given.get("type") or "adamw") != "adamw":
        raise Unsupported(
            f"optimizer {kind!r} is not supported", hint="use adamw", field=f"{where}.type"
        )
    set_fields = {name: value for name, value in given.items() if value is not None}
    known = AdamFields.__struct_fields__
    for name in set_fields:
        if name not in known:
            raise InvalidArgument(
                f"{where} has {name!r}, which adamw does not take",
                hint=f"it takes {', '.join(known[1:])}",
                field=f"{where}.{name}",
            )
    try:
        return msgspec.convert(set_fields, AdamFields)
    except msgspec.ValidationError as exc:
        raise InvalidArgument(f"{where} is invalid: {exc}", field=where) from exc
