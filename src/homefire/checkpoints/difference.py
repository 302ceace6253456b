"""How far apart two snapshots are: which elements differ in their bits, and by how much."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from homefire.checkpoints.dtypes import (
    ITEM_BYTES,
    bit_patterns,
    num_elements,
    numpy_array,
    to_float32,
)
from homefire.wire.errors import FailedPrecondition
from homefire.wire.tensors import RawTensor, Tensors


@dataclass(frozen=True)
class TensorDifference:
    name: str
    num_elements: int
    num_changed: int
    """Elements whose bits differ; -0.0 and 0.0 do."""
    largest: float | None
    """The largest absolute difference; None for dtypes that are no floats numpy can widen."""


def compare(before: Tensors, after: Tensors) -> list[TensorDifference]:
    """One row per tensor, sorted by name. FailedPrecondition where names, dtypes or shapes differ."""
    for name in sorted(before.keys() | after.keys()):
        found = [_layout(tensors.get(name)) for tensors in (before, after)]
        if found[0] != found[1]:
            raise FailedPrecondition(
                f"the snapshots have different tensors: {name!r} is {found[0]} in the first and"
                f" {found[1]} in the second",
                hint="compare snapshots of one model, or adapters of one shape",
            )
    return [_difference(name, before[name], after[name]) for name in sorted(before)]


def _layout(tensor: RawTensor | None) -> str:
    return "absent" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"


def _difference(name: str, before: RawTensor, after: RawTensor) -> TensorDifference:
    item_bytes = ITEM_BYTES[before.dtype]
    changed = np.flatnonzero(bit_patterns(before, item_bytes) != bit_patterns(after, item_bytes))
    largest: float | None = 0.0
    if len(changed):
        pair = [_values(tensor, changed) for tensor in (before, after)]
        largest = _largest(*pair)
    return TensorDifference(name, num_elements(before), len(changed), largest)


def _values(tensor: RawTensor, places: npt.NDArray[np.intp]) -> npt.NDArray[np.float64] | None:
    try:
        wide = tensor if tensor.dtype == "F64" else to_float32(tensor)
    except KeyError:
        return None
    return numpy_array(wide).reshape(-1)[places].astype(np.float64)


def _largest(
    before: npt.NDArray[np.float64] | None, after: npt.NDArray[np.float64] | None
) -> float | None:
    if before is None or after is None:
        return None
    with np.errstate(invalid="ignore"):
        return float(np.abs(after - before).max())
