"""Taking over an adapter that was trained elsewhere, as PEFT saved it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from homefire.checkpoints import (
    AdapterDirectory,
    RawTensor,
    Tensors,
    numpy_array,
    read_adapter_directory,
    to_float32,
)
from homefire.trainer.engine.slots import Slot
from homefire.trainer.engine.states import serving_digest
from homefire.wire.engine import LoadAdapter, LoraSpec, StateLoaded
from homefire.wire.errors import FailedPrecondition, InvalidArgument, Unsupported
from homefire.wire.peft import adapted_modules

_NUM_NAMED = 3
_FIELD = "adapter_path"


def load_adapter(slot: Slot, request: LoadAdapter) -> StateLoaded:
    """All of it or nothing. The reply's digest is that of the serving weights."""
    trained = slot.trainable()
    if slot.lora is None:
        raise InvalidArgument(
            "load_adapter: this model trains all parameters",
            hint="create a LoRA model and load the adapter into that",
            field=_FIELD,
        )
    adapter = read_adapter_directory(Path(request.directory))
    if adapter.digest != request.digest:
        raise FailedPrecondition(
            f"the adapter in {request.directory} is not the one that was there when load_adapter was"
            f" accepted: its digest is {adapter.digest[:16]}, was {request.digest[:16]}",
            hint="call load_adapter again",
        )
    _check_scale(adapter, slot.lora)
    _check_modules(adapter.tensors, trained.files().masters)
    masters = {name: _float32(name, tensor) for name, tensor in adapter.tensors.items()}
    trained.check_fits(masters)
    trained.restore(masters, None, {})
    slot.clear_gradient()
    return StateLoaded(step=slot.step, digest=serving_digest(slot))


def _check_scale(adapter: AdapterDirectory, live: LoraSpec) -> None:
    """With another alpha the same weights would be another model."""
    found = {"rank": adapter.config.r, "alpha": adapter.config.lora_alpha}
    for name, value in found.items():
        here = getattr(live, name)
        if value != here:
            raise InvalidArgument(
                f"the adapter has {name} {value:g}, this model's has {here:g}",
                hint=f"create a model with {name} {value:g} and load the adapter into that",
                field=_FIELD,
            )


def _check_modules(found: Tensors, masters: Tensors) -> None:
    adapted, trained = set(adapted_modules(found)), set(adapted_modules(masters))
    if adapted == trained:
        return
    raise InvalidArgument(
        f"the adapter adapts {len(adapted)} modules, this model {len(trained)}:"
        f" only the adapter has {_some(adapted - trained)}, only the model {_some(trained - adapted)}",
        hint="create a model with the adapter's train_attn, train_mlp and train_unembed",
        field=_FIELD,
    )


def _some(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:_NUM_NAMED]) or "nothing"
    return f"{shown} and {len(names) - _NUM_NAMED} more" if len(names) > _NUM_NAMED else shown


def _float32(name: str, tensor: RawTensor) -> RawTensor:
    try:
        wide = to_float32(tensor)
    except KeyError as exc:
        raise Unsupported(
            f"the adapter's {name!r} is {tensor.dtype}", hint="save it as F32, BF16 or F16"
        ) from exc
    if not np.isfinite(numpy_array(wide)).all():
        raise InvalidArgument(f"the adapter's {name!r} holds NaN or Inf", field=_FIELD)
    return wide
