"""A tensor as the bytes that cross a process boundary: what checkpoints hold and digests are over.

Lives here because `homefire.checkpoints` and `homefire.model` both speak it and never import one
another. Torch-free.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from homefire.wire.manifest import TensorEntry


@dataclass(frozen=True)
class RawTensor:
    """Example: RawTensor("BF16", (320, 128), <uint8 [81920]>)."""

    dtype: str
    """safetensors' name: BF16, F16, F32, F64, I64, …"""
    shape: tuple[int, ...]
    data: npt.NDArray[Any]
    """uint8, 1-D: the tensor's little-endian bytes in C order; may be a read-only view of a file."""


Tensors = Mapping[str, RawTensor]


def tensor_digest(tensor: RawTensor) -> str:
    """SHA-256, hex, of the tensor's bytes."""
    return hashlib.sha256(np.ascontiguousarray(tensor.data).data).hexdigest()


def digest_tensors(tensors: Tensors) -> dict[str, TensorEntry]:
    """The entries of a manifest for these tensors."""
    return {
        name: TensorEntry(tensor.dtype, tuple(tensor.shape), tensor_digest(tensor))
        for name, tensor in tensors.items()
    }
