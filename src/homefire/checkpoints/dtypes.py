"""The dtypes that a checkpoint may hold, by safetensors' names, and how to see their raw bits.

numpy has no bfloat16 and no float8, so tensors are handled as unsigned bit patterns throughout.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from homefire.wire.tensors import RawTensor

ITEM_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
    "C64": 8,
}
"""Bytes of one element. Sub-byte formats (F4, F6) are not supported."""

_NUMPY_DTYPES = {
    "BOOL": "?",
    "U8": "u1",
    "I8": "i1",
    "I16": "<i2",
    "U16": "<u2",
    "F16": "<f2",
    "I32": "<i4",
    "U32": "<u4",
    "F32": "<f4",
    "I64": "<i8",
    "U64": "<u8",
    "F64": "<f8",
    "C64": "<c8",
}
_NAMES = {np.dtype(spelling): name for name, spelling in _NUMPY_DTYPES.items()}


def num_elements(tensor: RawTensor) -> int:
    return math.prod(tensor.shape)


def is_well_formed(tensor: RawTensor) -> bool:
    """Whether the dtype is known and the bytes are as many as dtype and shape say."""
    item_bytes = ITEM_BYTES.get(tensor.dtype)
    return item_bytes is not None and tensor.data.nbytes == num_elements(tensor) * item_bytes


def bit_patterns(tensor: RawTensor, item_bytes: int) -> npt.NDArray[Any]:
    """The elements as unsigned little-endian integers, 1-D, a view of the tensor's bytes."""
    return tensor.data.view(f"<u{item_bytes}")


def raw_tensor(array: npt.NDArray[Any]) -> RawTensor:
    """A numpy array as the bytes that checkpoints hold. Copies only what is not in C order."""
    name = _NAMES[array.dtype.newbyteorder("<")]
    little = np.ascontiguousarray(array, dtype=_NUMPY_DTYPES[name])
    return RawTensor(name, tuple(array.shape), little.reshape(-1).view(np.uint8))


def numpy_array(tensor: RawTensor) -> npt.NDArray[Any]:
    """The tensor as a numpy array that views its bytes. KeyError for dtypes numpy lacks (BF16, F8)."""
    return tensor.data.view(_NUMPY_DTYPES[tensor.dtype]).reshape(tensor.shape)


def to_float32(tensor: RawTensor) -> RawTensor:
    """The same values in float32, exactly. KeyError for dtypes that are wider, or no floats."""
    if tensor.dtype == "BF16":
        wide = bit_patterns(tensor, 2).astype("<u4") << 16
        return RawTensor("F32", tensor.shape, wide.view(np.uint8))
    if tensor.dtype not in ("F16", "F32"):
        raise KeyError(tensor.dtype)
    return raw_tensor(numpy_array(tensor).astype("<f4"))


def round_to_bf16(values: npt.NDArray[np.float32]) -> RawTensor:
    """Finite float32 values as bfloat16, rounded to nearest even as torch does."""
    bits = np.ascontiguousarray(values, dtype="<f4").reshape(-1).view("<u4")
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return RawTensor("BF16", tuple(values.shape), rounded.astype("<u2").view(np.uint8))
