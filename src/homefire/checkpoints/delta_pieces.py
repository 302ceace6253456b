"""A tensor's change, piece by piece: bounded memory, however large the tensor, and work for threads.

A piece is a run of `PIECE_ELEMENTS` elements (the last one is shorter). Each is encoded by what it holds,
with the codec that suits it. numpy and zstd release the interpreter for their large parts.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from homefire.checkpoints.delta_codec import EncodedTensor, decode_tensor, encode_tensor
from homefire.checkpoints.dtypes import ITEM_BYTES, num_elements
from homefire.wire.errors import DigestMismatch
from homefire.wire.tensors import RawTensor, Tensors

PIECE_ELEMENTS = 1 << 18
"""512 KiB of bfloat16, so that what encoding needs beside stays in a core's cache."""
_AHEAD = 2
"""Pieces per thread that are encoded before they are asked for."""
Item = TypeVar("Item")
Made = TypeVar("Made")


@dataclass(frozen=True)
class EncodedPiece:
    name: str
    """Of the tensor."""
    encoded: EncodedTensor | None
    """None: no bit of the piece differs."""


def default_threads() -> int:
    """Half of the cores that this process may use: training goes on beside a save."""
    return max(1, len(os.sched_getaffinity(0)) // 2)


def num_pieces(tensor: RawTensor, piece_elements: int = PIECE_ELEMENTS) -> int:
    return -(-num_elements(tensor) // piece_elements)


def encode_pieces(
    old: Tensors, new: Tensors, *, threads: int, piece_elements: int = PIECE_ELEMENTS
) -> Iterator[EncodedPiece]:
    """In the order of `new` and of each tensor's elements. Both agree in names, dtypes and shapes."""

    def encode(item: tuple[str, int]) -> EncodedPiece:
        name, number = item
        before, after = (_piece(tensors[name], number, piece_elements) for tensors in (old, new))
        return EncodedPiece(name, encode_tensor(before, after))

    items = (
        (name, number)
        for name, tensor in new.items()
        for number in range(num_pieces(tensor, piece_elements))
    )
    return _in_order(encode, items, threads)


def decode_pieces(
    old: RawTensor, pieces: list[EncodedTensor | None], piece_elements: int, *, threads: int
) -> RawTensor:
    """The new tensor. DigestMismatch when the pieces are not those of such a tensor."""
    if len(pieces) != num_pieces(old, piece_elements):
        raise DigestMismatch(f"a delta has {len(pieces)} pieces for a tensor of {old.shape}")
    data = np.empty(old.data.nbytes, np.uint8)
    size = piece_elements * ITEM_BYTES[old.dtype]

    def decode(item: tuple[int, EncodedTensor | None]) -> None:
        number, encoded = item
        before = _piece(old, number, piece_elements)
        after = before if encoded is None else decode_tensor(before, encoded)
        data[number * size : (number + 1) * size] = after.data

    for _ in _in_order(decode, enumerate(pieces), threads):
        pass
    return RawTensor(old.dtype, old.shape, data)


def _piece(tensor: RawTensor, number: int, piece_elements: int) -> RawTensor:
    size = piece_elements * ITEM_BYTES[tensor.dtype]
    data = tensor.data[number * size : (number + 1) * size]
    return RawTensor(tensor.dtype, (data.size // ITEM_BYTES[tensor.dtype],), data)


def _in_order(make: Callable[[Item], Made], items: Iterable[Item], threads: int) -> Iterator[Made]:
    """`map` by threads that run ahead of the caller by a few items only."""
    if threads == 1:
        yield from map(make, items)
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="delta") as pool:
        waiting: deque[Future[Made]] = deque()
        for item in items:
            waiting.append(pool.submit(make, item))
            if len(waiting) > _AHEAD * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
