"""A save in two halves: its bytes are taken between operations, and written while training goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from homefire.wire.engine import SaveReply
from homefire.wire.tensors import RawTensor, Tensors

Saved = TypeVar("Saved", bound=SaveReply, covariant=True)
Write = Callable[[], Saved]
"""Blocks until the save is durable; raises what went wrong, and then nothing was saved.

Saves of one engine are written one at a time, in the order in which their bytes were taken: a delta's
parent is the snapshot before it.
"""


@dataclass(frozen=True)
class PreparedSave(Generic[Saved]):
    """Everything that is checked before a byte is written, checked."""

    size_bytes: int
    """What stays in memory for it until it is written, when it is kept."""
    write: Write[Saved]
    """At once: it may read live weights."""
    keep: Callable[[], Write[Saved]]
    """Takes a copy that no later step changes, and gives the writing of it."""


def already_own(size_bytes: int, write: Write[Saved]) -> PreparedSave[Saved]:
    """A save of fresh tensors: there is nothing left to copy."""
    return PreparedSave(size_bytes, write, keep=lambda: write)


def owned(tensors: Tensors) -> dict[str, RawTensor]:
    """The same bytes in memory of their own."""
    return {
        name: RawTensor(tensor.dtype, tensor.shape, np.array(tensor.data, copy=True))
        for name, tensor in tensors.items()
    }


def num_bytes(*groups: Mapping[str, RawTensor]) -> int:
    return sum(tensor.data.nbytes for tensors in groups for tensor in tensors.values())
