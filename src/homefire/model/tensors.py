"""Weights between a live module and the raw tensors that checkpoints hold.

A snapshot's tensors carry Hugging Face state-dict names and the serving dtype; names that alias
another tensor (a tied head) are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from homefire.wire.errors import InvalidArgument
from homefire.wire.manifest import whole_digest
from homefire.wire.tensors import RawTensor, Tensors, digest_tensors

if TYPE_CHECKING:
    from homefire.model.loading import LoadedModel

DTYPE_NAMES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.bool: "BOOL",
}
"""torch's dtypes under safetensors' names."""
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


def raw(tensor: Tensor) -> RawTensor:
    """The tensor's bytes; no copy for a contiguous CPU tensor, so they follow its later changes."""
    flat = tensor.detach().cpu().contiguous()
    data = flat.reshape(-1).view(torch.uint8).numpy()
    return RawTensor(DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), data)


def from_raw(tensor: RawTensor) -> Tensor:
    """A CPU tensor over the same bytes; copied only where they are read-only or misaligned."""
    dtype = _DTYPES[tensor.dtype]
    data = np.ascontiguousarray(tensor.data)
    if not data.flags.writeable or data.ctypes.data % dtype.itemsize:
        data = data.copy()
    return torch.from_numpy(data).view(dtype).reshape(tensor.shape)


def serving_tensors(model: LoadedModel) -> dict[str, Tensor]:
    """What a snapshot of this module holds now: fresh CPU tensors in the serving dtype.

    Persistent buffers keep their own dtype.
    """
    return {
        name: tensor.detach()
        .to(served_dtype(tensor, model.serving_dtype), copy=True)
        .cpu()
        .contiguous()
        for name, tensor in live_tensors(model)
    }


def memory_digest(model: LoadedModel, beside: Tensors | None = None) -> str:
    """The digest of the weights as they lie in memory; a manifest of the same weights has the same.

    `beside` is what is kept outside the module. Float32 compute weights are rounded back, which is
    exact since they hold serving values.
    """
    tensors = {name: raw(tensor) for name, tensor in serving_tensors(model).items()}
    return whole_digest(digest_tensors(tensors | dict(beside or {})))


@torch.no_grad()
def load_serving_tensors(model: LoadedModel, tensors: Tensors) -> None:
    """Copies a snapshot into the live module, in place, so ties and views hold.

    Names, shapes and dtypes are checked whole before the first copy: InvalidArgument changes nothing.
    """
    live = dict(live_tensors(model))
    _check_fits(live, tensors, model.serving_dtype)
    for name, tensor in live.items():
        tensor.copy_(from_raw(tensors[name]))


def live_tensors(model: LoadedModel) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers by state-dict name, aliases left out."""
    for name, tensor in model.module.state_dict(keep_vars=True).items():
        if name not in model.tied:
            yield name, tensor


def tied_to(model: LoadedModel) -> dict[str, str]:
    """The name in snapshots of each tensor that is only an alias, e.g. of `lm_head.weight`."""
    names = {id(tensor): name for name, tensor in live_tensors(model)}
    state = model.module.state_dict(keep_vars=True)
    return {alias: names[id(state[alias])] for alias in sorted(model.tied)}


def served_dtype(tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    """What a snapshot holds this live tensor in: parameters in the serving dtype, buffers in theirs."""
    return dtype if _is_parameter(tensor) else tensor.dtype


def _is_parameter(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) and tensor.is_floating_point()


def _check_fits(live: Mapping[str, Tensor], tensors: Tensors, dtype: torch.dtype) -> None:
    if different := sorted(live.keys() ^ tensors.keys()):
        where = "lack" if different[0] in live else "have a surplus"
        raise InvalidArgument(
            f"the weights {where} {different[0]!r} ({len(different)} names differ)",
            hint="they belong to another base model",
        )
    for name, tensor in live.items():
        wanted = DTYPE_NAMES[served_dtype(tensor, dtype)]
        given = tensors[name]
        if given.dtype != wanted or tuple(given.shape) != tuple(tensor.shape):
            raise InvalidArgument(
                f"{name!r} is {given.dtype} {list(given.shape)},"
                f" the model has {wanted} {list(tensor.shape)}",
                hint="they belong to another base model or serving dtype",
            )
