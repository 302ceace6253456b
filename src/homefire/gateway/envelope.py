"""Who a root Tinker request is for: its ids, read without building its data.

JSON is scanned for the id fields and nothing else is kept. In protobuf the model id is field 1 of a
ForwardBackwardRequest; every other field is skipped by its length. Of a compressed body a prefix is
enough when the id comes first, as the clients write it.
"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import zstandard

from homefire.gateway.caller import Caller
from homefire.http.bodies import MAX_BODY_BYTES, decode_json, decompress_zstd
from homefire.wire.errors import InvalidArgument, PayloadTooLarge, Unsupported

_PROTOBUF = "application/x-protobuf"
_MODEL_ID_FIELD = 1
_PREFIX_BYTES = 16 << 10
_VARINT, _FIXED64, _LENGTH_DELIMITED, _FIXED32 = 0, 1, 2, 5


class _Lora(msgspec.Struct, frozen=True):
    rank: int = 32


class Envelope(msgspec.Struct, frozen=True):
    """The fields that routing looks at; each client sends those of its request."""

    model_id: str | None = None
    request_id: str | None = None
    session_id: str | None = None
    model_seq_id: int | None = None
    sampling_session_id: str | None = None
    base_model: str | None = None
    path: str | None = None
    lora_config: _Lora | None = None
    user_metadata: dict[str, Any] | None = None
    num_samples: int | None = None


async def read_envelope(caller: Caller, *, max_bytes: int = MAX_BODY_BYTES) -> Envelope:
    """Keeps the body for forwarding. Raises InvalidArgument, PayloadTooLarge, Unsupported."""
    _check_declared_length(caller, max_bytes)
    body = await caller.body.read(max_bytes=max_bytes)
    encoding = caller.headers.get("content-encoding", "identity").lower()
    if encoding not in {"identity", "zstd"}:
        raise Unsupported(
            f"content-encoding {encoding!r} is not supported", hint="send zstd, or plain bodies"
        )
    is_proto = caller.headers.get("content-type", "").startswith(_PROTOBUF)
    if is_proto:
        model_id = _compressed_model_id(body) if encoding == "zstd" else None
        if model_id is None:
            plain = await _plain(body, encoding)
            model_id = text_field(plain, _MODEL_ID_FIELD)
        return Envelope(model_id=model_id)
    return await decode_json(await _plain(body, encoding) or b"{}", Envelope)


def text_field(message: bytes, number: int) -> str | None:
    """A text field at the top level of a protobuf message; the last one counts, as in protobuf.

    InvalidArgument for bytes that are no message.
    """
    found: str | None = None
    position = 0
    try:
        while position < len(message):
            key, position = _varint(message, position)
            start, end = _value_bounds(message, position, key & 7)
            if end > len(message):
                raise IndexError
            if key >> 3 == number and key & 7 == _LENGTH_DELIMITED:
                found = message[start:end].decode()
            position = end
    except (IndexError, UnicodeDecodeError) as exc:
        raise InvalidArgument("the body is not a ForwardBackwardRequest") from exc
    return found


def leading_text_field(message: bytes, number: int) -> str | None:
    """The same field where it is the first of the message; None where something else is."""
    try:
        key, position = _varint(message, 0)
        start, end = _value_bounds(message, position, key & 7)
    except (IndexError, InvalidArgument):
        return None
    if key != number << 3 | _LENGTH_DELIMITED or end > len(message):
        return None
    return message[start:end].decode(errors="replace")


def _compressed_model_id(body: bytes) -> str | None:
    reader = zstandard.ZstdDecompressor().stream_reader(body)
    try:
        prefix = reader.read(_PREFIX_BYTES)
    except zstandard.ZstdError as exc:
        raise InvalidArgument(f"the zstd body is damaged: {exc}") from exc
    return leading_text_field(prefix, _MODEL_ID_FIELD)


async def _plain(body: bytes, encoding: str) -> bytes:
    return await asyncio.to_thread(decompress_zstd, body) if encoding == "zstd" else body


def _check_declared_length(caller: Caller, max_bytes: int) -> None:
    declared = caller.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > max_bytes:
        raise PayloadTooLarge(f"the body has {declared} bytes, the cap is {max_bytes}")


def _value_bounds(message: bytes, position: int, wire_type: int) -> tuple[int, int]:
    """Where a field's value begins and ends. IndexError when it is cut off."""
    if wire_type == _LENGTH_DELIMITED:
        length, start = _varint(message, position)
        return start, start + length
    if wire_type == _VARINT:
        return position, _varint(message, position)[1]
    if wire_type in (_FIXED64, _FIXED32):
        return position, position + (8 if wire_type == _FIXED64 else 4)
    raise InvalidArgument("the body is not a ForwardBackwardRequest")


def _varint(message: bytes, position: int) -> tuple[int, int]:
    """The number, and where the next thing begins."""
    value = shift = 0
    while True:
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise InvalidArgument("the body is not a ForwardBackwardRequest")
