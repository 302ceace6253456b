"""safetensors files on raw bytes: the `safetensors` package's numpy side cannot read bfloat16.

A file is `<u64 little-endian header bytes><JSON header><tensor bytes>`; the header maps each name to
dtype, shape and `data_offsets`, and `__metadata__` to strings (huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import hashlib
import math
import mmap
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from homefire.checkpoints.dtypes import ITEM_BYTES, is_well_formed
from homefire.checkpoints.file_digest import file_entry
from homefire.wire.errors import DigestMismatch, InvalidArgument
from homefire.wire.manifest import FileEntry
from homefire.wire.tensors import RawTensor, Tensors

MAX_HEADER_BYTES = 100_000_000
"""The cap of the reference implementation."""
_PREFIX = struct.Struct("<Q")
_METADATA = "__metadata__"
_WRITE_BYTES = 8 << 20

Parsed = TypeVar("Parsed")


class _Entry(msgspec.Struct, frozen=True):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


def read_safetensors(path: Path) -> dict[str, RawTensor]:
    """The tensors of a file as read-only views of it, in the order of their bytes.

    The whole layout is checked before a tensor is handed out: known dtypes, sizes that fit shapes, no
    gaps, no overlaps, nothing past the end. DigestMismatch says what is damaged.
    """
    data, raw_header = _map(path)
    raw_header.pop(_METADATA, None)
    entries = {name: _parse(raw, _Entry, path) for name, raw in raw_header.items()}
    ordered = sorted(entries.items(), key=lambda item: item[1].data_offsets)
    _check_layout(path, ordered, data.size)
    return {
        name: RawTensor(entry.dtype, entry.shape, data[slice(*entry.data_offsets)])
        for name, entry in ordered
    }


def read_metadata(path: Path) -> dict[str, str]:
    """The strings under `__metadata__`; empty when there are none."""
    _, raw_header = _map(path)
    raw = raw_header.get(_METADATA, msgspec.Raw(b"{}"))
    return _parse(raw, dict[str, str], path)


def write_safetensors(
    path: Path, tensors: Tensors, metadata: dict[str, str] | None = None
) -> FileEntry:
    """Writes a new file and returns its size and SHA-256, computed on the way.

    Wide dtypes come first, so that every tensor is aligned to its elements. Not durable by itself:
    the store syncs what it publishes.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-_item_bytes(path, *item), item[0]))
    header = _encode_header(ordered, metadata)
    with path.open("xb") as file:
        hashing = _HashingWriter(file)
        hashing.write(_PREFIX.pack(len(header)) + header)
        for _, tensor in ordered:
            hashing.write(tensor.data)
    return hashing.entry()


class BlobFileWriter:
    """A safetensors file of byte blobs that are written as they come, in one pass and little memory.

    The header goes before what it describes. So the first blobs are held until their number is known to
    be small, and then follow an exact header; or room for the longest header is left, and padded with
    spaces. Use as a context manager; without `finish` the file is no safetensors file.
    """

    def __init__(self, path: Path, *, header_room_bytes: int, hold_bytes: int = 4 << 20) -> None:
        self._path = path
        self._room = header_room_bytes
        self._hold_bytes = hold_bytes
        self._held: list[bytes] | None = []
        """None: they are written, behind the room."""
        self._entries: dict[str, _Entry] = {}
        self._end = 0
        self._file = path.open("xb")

    def __enter__(self) -> BlobFileWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def size_bytes(self) -> int:
        """Of the blobs so far."""
        return self._end

    def append(self, name: str, data: bytes) -> None:
        """More bytes of the blob `name`, which is the last one, or a new one."""
        begun = self._entries.get(name)
        start = begun.data_offsets[0] if begun else self._end
        self._end += len(data)
        self._entries[name] = _Entry("U8", (self._end - start,), (start, self._end))
        if self._held is None:
            self._file.write(data)
            return
        self._held.append(data)
        if self._end > self._hold_bytes:
            self._file.seek(_PREFIX.size + self._room)
            self._file.writelines(self._held)
            self._held = None

    def finish(self, metadata: dict[str, str]) -> FileEntry:
        """Its size and SHA-256. Not durable by itself: the store syncs what it publishes."""
        header = msgspec.json.encode({_METADATA: metadata, **self._entries})
        room = self._room if self._held is None else len(header)
        if len(header) > room:
            raise InvalidArgument(
                f"the header of {self._path.name} has {len(header)} bytes, room was for {room}"
            )
        self._file.seek(0)
        self._file.write(_PREFIX.pack(room) + header.ljust(room))
        self._file.writelines(self._held or ())
        self._file.close()
        return file_entry(self._path)


def _map(path: Path) -> tuple[npt.NDArray[np.uint8], dict[str, msgspec.Raw]]:
    """The bytes behind the header, mapped read-only, and the header's entries still as JSON."""
    with path.open("rb") as file:
        size = path.stat().st_size
        prefix = file.read(_PREFIX.size)
        if len(prefix) < _PREFIX.size:
            raise _damaged(path, f"it has only {size} bytes")
        (header_bytes,) = _PREFIX.unpack(prefix)
        if header_bytes > min(MAX_HEADER_BYTES, size - _PREFIX.size):
            raise _damaged(path, f"its header claims {header_bytes} bytes, the file has {size}")
        header = _parse(file.read(header_bytes), dict[str, msgspec.Raw], path)
        mapped = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    return mapped[_PREFIX.size + header_bytes :], header


def _parse(raw: bytes | msgspec.Raw, kind: type[Parsed], path: Path) -> Parsed:
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise _damaged(path, f"its header is not valid: {exc}") from exc


def _check_layout(path: Path, ordered: Iterable[tuple[str, _Entry]], num_bytes: int) -> None:
    end = 0
    for name, entry in ordered:
        if entry.dtype not in ITEM_BYTES or any(size < 0 for size in entry.shape):
            raise _damaged(path, f"tensor {name!r} has dtype {entry.dtype}, shape {entry.shape}")
        start, stop = entry.data_offsets
        if start != end or stop - start != math.prod(entry.shape) * ITEM_BYTES[entry.dtype]:
            raise _damaged(path, f"tensor {name!r} lies at {start}:{stop}, expected from {end} on")
        end = stop
    if end != num_bytes:
        raise _damaged(path, f"its tensors end at byte {end} of {num_bytes}")


def _item_bytes(path: Path, name: str, tensor: RawTensor) -> int:
    if not is_well_formed(tensor):
        raise InvalidArgument(
            f"tensor {name!r} for {path.name} has {tensor.data.nbytes} bytes, which does not fit "
            f"dtype {tensor.dtype} and shape {tuple(tensor.shape)}"
        )
    return ITEM_BYTES[tensor.dtype]


def _encode_header(
    ordered: Iterable[tuple[str, RawTensor]], metadata: dict[str, str] | None
) -> bytes:
    """Padded with spaces, so that the tensors start at a multiple of 8 bytes."""
    header: dict[str, Any] = {_METADATA: metadata} if metadata else {}
    start = 0
    for name, tensor in ordered:
        stop = start + tensor.data.nbytes
        header[name] = _Entry(tensor.dtype, tuple(tensor.shape), (start, stop))
        start = stop
    encoded = msgspec.json.encode(header)
    return encoded + b" " * (-len(encoded) % 8)


def _damaged(path: Path, reason: str) -> DigestMismatch:
    return DigestMismatch(f"{path} is not a whole safetensors file: {reason}")


class _HashingWriter:
    """Writes through to a file, in pieces, and hashes what passes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._hasher = hashlib.sha256()
        self._size = 0

    def write(self, data: bytes | npt.NDArray[Any]) -> None:
        view = data.data if isinstance(data, np.ndarray) else memoryview(data)
        for start in range(0, view.nbytes, _WRITE_BYTES):
            piece = view[start : start + _WRITE_BYTES]
            self._hasher.update(piece)
            self._file.write(piece)
        self._size += view.nbytes

    def entry(self) -> FileEntry:
        return FileEntry(self._size, self._hasher.hexdigest())
