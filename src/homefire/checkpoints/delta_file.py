"""`delta.safetensors`: the changed tensors of a delta snapshot.

A safetensors file with one U8 blob per changed tensor (the encoded parts of its pieces end to end) and, in
`__metadata__`, the format, the elements of a piece, and a JSON map of tensor name to `TensorDelta`. It is
written in one pass while pieces are encoded, and read as a view.

Format 1 had one piece per tensor and no piece size; it is still read.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

import msgspec

from homefire.checkpoints.delta_codec import DeltaCodec, EncodedTensor
from homefire.checkpoints.delta_pieces import (
    PIECE_ELEMENTS,
    EncodedPiece,
    decode_pieces,
    num_pieces,
)
from homefire.checkpoints.dtypes import ITEM_BYTES, num_elements
from homefire.checkpoints.safetensors_file import (
    BlobFileWriter,
    read_metadata,
    read_safetensors,
)
from homefire.wire.errors import DigestMismatch, Unsupported
from homefire.wire.manifest import FileEntry
from homefire.wire.tensors import RawTensor, Tensors

DELTA_FILE = "delta.safetensors"
DELTA_FORMAT = "homefire-delta/2"
_FORMAT_1 = "homefire-delta/1"
_FORMAT = "format"
_HEADERS = "tensors"
_PIECE_ELEMENTS = "piece_elements"
_NUM_GAPS_PARTS = 3


class Piece(msgspec.Struct, frozen=True, array_like=True):
    codec: DeltaCodec | None
    """None: nothing of the piece changed."""
    num_changed: int = 0
    """Elements whose bits differ from the base."""
    part_bytes: tuple[int, ...] = ()
    """Sizes of the parts, which lie end to end."""


class TensorDelta(msgspec.Struct, frozen=True, kw_only=True):
    """What a delta file says of one tensor."""

    base_digest: str
    """SHA-256, hex, of the tensor that the delta applies to."""
    result_digest: str
    """SHA-256, hex, of the tensor that applying it gives."""
    pieces: list[Piece]
    """In the order of their elements; every piece of the tensor."""

    @property
    def num_changed(self) -> int:
        return sum(piece.num_changed for piece in self.pieces)


class DeltaFileWriter:
    """Use as a context manager: `add` the pieces of all tensors in their order, then `finish`."""

    def __init__(self, path: Path, tensors: Tensors) -> None:
        """`tensors` are those that may have changed."""
        self._file = BlobFileWriter(path, header_room_bytes=_header_room(tensors))
        self._pieces: dict[str, list[Piece]] = {}

    def __enter__(self) -> DeltaFileWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.__exit__()

    @property
    def size_bytes(self) -> int:
        return self._file.size_bytes

    def add(self, piece: EncodedPiece) -> None:
        pieces, encoded = self._pieces.setdefault(piece.name, []), piece.encoded
        if encoded is None:
            pieces.append(Piece(None))
            return
        part_bytes = tuple(map(len, encoded.parts))
        pieces.append(Piece(encoded.codec, encoded.num_changed, part_bytes))
        for part in encoded.parts:
            self._file.append(piece.name, part)

    def num_changed(self, name: str) -> int:
        """Elements of a tensor."""
        return sum(piece.num_changed for piece in self._pieces.get(name, ()))

    def finish(self, digests: Mapping[str, tuple[str, str]]) -> FileEntry:
        """`digests`: those of the base tensor and of the result, of every tensor that has changed."""
        deltas = {
            name: TensorDelta(base_digest=base, result_digest=result, pieces=self._pieces[name])
            for name, (base, result) in digests.items()
        }
        return self._file.finish(_metadata(deltas))


@dataclass(frozen=True)
class DeltaFile:
    deltas: dict[str, TensorDelta]
    """Of the changed tensors, by name."""
    blobs: dict[str, RawTensor]
    piece_elements: int

    def apply(self, name: str, old: RawTensor, *, threads: int = 1) -> RawTensor:
        """A changed tensor as it becomes. DigestMismatch when the pieces are no such change."""
        pieces = list(self._pieces(name))
        return decode_pieces(old, pieces, self.piece_elements, threads=threads)

    def _pieces(self, name: str) -> Iterator[EncodedTensor | None]:
        data, end = self.blobs[name].data.data, 0
        for piece in self.deltas[name].pieces:
            cuts = list(accumulate(piece.part_bytes, initial=end))
            end = cuts[-1]
            parts = [bytes(data[start:stop]) for start, stop in pairwise(cuts)]
            yield EncodedTensor(piece.codec, piece.num_changed, parts) if piece.codec else None


def read_delta_file(path: Path) -> DeltaFile:
    """DigestMismatch when headers and blobs do not fit each other; Unsupported for another format."""
    deltas, piece_elements = _read_headers(path)
    blobs = read_safetensors(path)
    if deltas.keys() != blobs.keys():
        raise DigestMismatch(f"{path}: headers and blobs name different tensors")
    for name, delta in deltas.items():
        sizes = [size for piece in delta.pieces for size in piece.part_bytes]
        if sum(sizes) != blobs[name].data.size or min(sizes, default=0) < 0:
            raise DigestMismatch(f"{path}: the parts of {name!r} do not fill its blob")
    return DeltaFile(deltas, blobs, piece_elements)


def _metadata(deltas: dict[str, TensorDelta]) -> dict[str, str]:
    return {
        _FORMAT: DELTA_FORMAT,
        _PIECE_ELEMENTS: str(PIECE_ELEMENTS),
        _HEADERS: msgspec.json.encode(deltas).decode(),
    }


def _header_room(tensors: Tensors) -> int:
    """Bytes of the longest header that these tensors can have: every piece changed, nothing saved."""
    total = sum(tensor.data.nbytes for tensor in tensors.values())
    digest = "0" * 64
    deltas = {
        name: TensorDelta(
            base_digest=digest,
            result_digest=digest,
            pieces=[_longest_piece(tensor)] * num_pieces(tensor),
        )
        for name, tensor in tensors.items()
    }
    entry = {"dtype": "U8", "shape": [total], "data_offsets": [total, total]}
    header = {"__metadata__": _metadata(deltas), **dict.fromkeys(tensors, entry)}
    return len(msgspec.json.encode(header))


def _longest_piece(tensor: RawTensor) -> Piece:
    num_parts = max(_NUM_GAPS_PARTS, ITEM_BYTES[tensor.dtype])
    sizes = (tensor.data.nbytes,) * num_parts
    return Piece(max(DeltaCodec, key=len), num_elements(tensor), sizes)


class _Header1(msgspec.Struct, frozen=True, kw_only=True):
    """Of a tensor in format 1."""

    codec: DeltaCodec
    num_changed: int
    part_bytes: tuple[int, ...]
    base_digest: str
    result_digest: str

    def delta(self) -> TensorDelta:
        piece = Piece(self.codec, self.num_changed, self.part_bytes)
        return TensorDelta(
            base_digest=self.base_digest, result_digest=self.result_digest, pieces=[piece]
        )


def _read_headers(path: Path) -> tuple[dict[str, TensorDelta], int]:
    metadata = read_metadata(path)
    headers, form = metadata.get(_HEADERS, ""), metadata.get(_FORMAT)
    if form not in {DELTA_FORMAT, _FORMAT_1}:
        raise Unsupported(
            f"{path} has format {form!r}, this homefire reads up to {DELTA_FORMAT!r}",
            hint="upgrade homefire",
        )
    try:
        if form == _FORMAT_1:
            old = msgspec.json.decode(headers, type=dict[str, _Header1])
            return {name: header.delta() for name, header in old.items()}, sys.maxsize
        piece_elements = int(metadata.get(_PIECE_ELEMENTS, ""))
        deltas = msgspec.json.decode(headers, type=dict[str, TensorDelta])
    except (msgspec.DecodeError, ValueError) as exc:
        raise DigestMismatch(f"{path}: its tensor headers are not valid: {exc}") from exc
    if piece_elements <= 0:
        raise DigestMismatch(f"{path}: pieces of {piece_elements} elements")
    return deltas, piece_elements
