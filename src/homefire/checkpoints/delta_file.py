"""`delta.safetensors`: the changed tensors of a delta snapshot.

A safetensors file with one U8 blob per changed tensor (its encoded parts end to end) and, in
`__metadata__`, the format and a JSON map of tensor name to `DeltaHeader`.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from pathlib import Path

import msgspec
import numpy as np

from homefire.checkpoints.delta_codec import DeltaHeader, EncodedTensor
from homefire.checkpoints.safetensors_file import (
    read_metadata,
    read_safetensors,
    write_safetensors,
)
from homefire.wire.errors import DigestMismatch, Unsupported
from homefire.wire.manifest import FileEntry
from homefire.wire.tensors import RawTensor

DELTA_FILE = "delta.safetensors"
DELTA_FORMAT = "homefire-delta/1"
_FORMAT = "format"
_HEADERS = "tensors"


def write_delta_file(
    path: Path, changes: dict[str, tuple[DeltaHeader, EncodedTensor]]
) -> FileEntry:
    blobs = {name: _blob(encoded) for name, (_, encoded) in changes.items()}
    headers = {name: header for name, (header, _) in changes.items()}
    metadata = {_FORMAT: DELTA_FORMAT, _HEADERS: msgspec.json.encode(headers).decode()}
    return write_safetensors(path, blobs, metadata)


def read_delta_file(path: Path) -> dict[str, tuple[DeltaHeader, EncodedTensor]]:
    """DigestMismatch when headers and blobs do not fit each other; Unsupported for another format."""
    headers = _read_headers(path)
    blobs = read_safetensors(path)
    if headers.keys() != blobs.keys():
        raise DigestMismatch(f"{path}: headers and blobs name different tensors")
    return {
        name: (header, _encoded(path, name, header, blobs[name]))
        for name, header in headers.items()
    }


def _blob(encoded: EncodedTensor) -> RawTensor:
    data = np.frombuffer(b"".join(encoded.parts), np.uint8)
    return RawTensor("U8", (data.size,), data)


def _read_headers(path: Path) -> dict[str, DeltaHeader]:
    metadata = read_metadata(path)
    if metadata.get(_FORMAT) != DELTA_FORMAT:
        raise Unsupported(
            f"{path} has format {metadata.get(_FORMAT)!r}, this homefire reads {DELTA_FORMAT!r}",
            hint="upgrade homefire",
        )
    try:
        return msgspec.json.decode(metadata.get(_HEADERS, ""), type=dict[str, DeltaHeader])
    except msgspec.DecodeError as exc:
        raise DigestMismatch(f"{path}: its tensor headers are not valid: {exc}") from exc


def _encoded(path: Path, name: str, header: DeltaHeader, blob: RawTensor) -> EncodedTensor:
    if sum(header.part_bytes) != blob.data.size or min(header.part_bytes, default=0) < 0:
        raise DigestMismatch(f"{path}: the parts of {name!r} do not fill its blob")
    data = blob.data.data
    cuts = pairwise(accumulate(header.part_bytes, initial=0))
    return EncodedTensor(
        header.codec, header.num_changed, [bytes(data[start:stop]) for start, stop in cuts]
    )
