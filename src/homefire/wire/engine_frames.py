"""Frames between a trainer front and its engine, over an inherited Unix stream socket.

One frame = `<4s magic><u32 header bytes><u64 body bytes>`, then a msgpack header, then raw arrays.
The header is an `Envelope`: the message (a tagged struct) and, per array, where it lies in the body.
Arrays are C-contiguous, little-endian, each aligned to 8 bytes. The front sends one request at a
time; the engine answers each with one reply: its result struct, or `Failure`. Between replies it may send
`SaveFinished` for saves that it answered with `SaveBegun`.
"""

from __future__ import annotations

import socket
import struct
from typing import Generic, TypeVar

import msgspec
import numpy as np

from homefire.wire.engine import Arrays, Reply, Request

Message = TypeVar("Message")
MAGIC = b"HFE1"
_PREFIX = struct.Struct("<4sIQ")
MAX_HEADER_BYTES = 64 << 20


class ArrayRef(msgspec.Struct, frozen=True, array_like=True):
    offset: int
    dtype: str
    shape: tuple[int, ...]


class Envelope(msgspec.Struct, Generic[Message], frozen=True):
    message: Message
    arrays: dict[str, ArrayRef] = {}


def encode_request(message: Request, arrays: Arrays | None = None) -> bytes:
    return encode_frame(message, arrays)


def encode_reply(message: Reply, arrays: Arrays | None = None) -> bytes:
    return encode_frame(message, arrays)


def decode_request(frame: bytes | memoryview) -> tuple[Request, Arrays]:
    return decode_frame(frame, Envelope[Request])


def decode_reply(frame: bytes | memoryview) -> tuple[Reply, Arrays]:
    return decode_frame(frame, Envelope[Reply])


def encode_frame(message: msgspec.Struct, arrays: Arrays | None = None) -> bytes:
    refs, chunks = _lay_out(arrays or {})
    return _frame(msgspec.msgpack.encode(Envelope(message, refs)), chunks)


def decode_frame(
    frame: bytes | memoryview, kind: type[Envelope[Message]]
) -> tuple[Message, Arrays]:
    """A whole frame -> message and read-only arrays that view its bytes."""
    header, body = _split(frame)
    envelope = msgspec.msgpack.decode(header, type=kind)
    return envelope.message, _views(envelope.arrays, body)


def read_frame(connection: socket.socket) -> bytes | None:
    """Blocks for one whole frame; None at a clean end of the stream. For the engine's side."""
    prefix = _read_exactly(connection, _PREFIX.size)
    if not prefix:
        return None
    rest = _read_exactly(connection, frame_rest(prefix))
    return prefix + rest if rest else None


def frame_rest(prefix: bytes) -> int:
    """How many bytes follow a frame's prefix of `PREFIX_BYTES`. For asyncio readers."""
    magic, header_bytes, body_bytes = _PREFIX.unpack(prefix)
    if magic != MAGIC or header_bytes > MAX_HEADER_BYTES:
        raise ValueError("not a homefire engine frame")
    return header_bytes + body_bytes


PREFIX_BYTES = _PREFIX.size


def _read_exactly(connection: socket.socket, count: int) -> bytes:
    buffer = bytearray(count)
    view, filled = memoryview(buffer), 0
    while filled < count:
        received = connection.recv_into(view[filled:])
        if received == 0:
            return b""
        filled += received
    return bytes(buffer)


def _lay_out(arrays: Arrays) -> tuple[dict[str, ArrayRef], list[bytes]]:
    refs: dict[str, ArrayRef] = {}
    chunks: list[bytes] = []
    offset = 0
    for name, array in arrays.items():
        raw = np.ascontiguousarray(array).tobytes()
        padding = -len(raw) % 8
        refs[name] = ArrayRef(offset, array.dtype.str, tuple(array.shape))
        chunks += [raw, b"\0" * padding]
        offset += len(raw) + padding
    return refs, chunks


def _frame(header: bytes, chunks: list[bytes]) -> bytes:
    body_bytes = sum(map(len, chunks))
    return b"".join([_PREFIX.pack(MAGIC, len(header), body_bytes), header, *chunks])


def _split(frame: bytes | memoryview) -> tuple[memoryview, memoryview]:
    view = memoryview(frame)
    _, header_bytes, _ = _PREFIX.unpack(view[:PREFIX_BYTES])
    return view[PREFIX_BYTES : PREFIX_BYTES + header_bytes], view[PREFIX_BYTES + header_bytes :]


def _views(refs: dict[str, ArrayRef], body: memoryview) -> Arrays:
    return {
        name: np.frombuffer(
            body,
            dtype=np.dtype(ref.dtype),
            count=int(np.prod(ref.shape, dtype=np.int64)),
            offset=ref.offset,
        ).reshape(ref.shape)
        for name, ref in refs.items()
    }
