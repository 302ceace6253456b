"""Reading request bodies under caps, and answering with msgspec."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any, TypeVar

import msgspec
import zstandard
from starlette.requests import Request
from starlette.responses import Response

from homefire.wire.errors import InvalidArgument, PayloadTooLarge

MAX_BODY_BYTES = 256 << 20
MAX_DECOMPRESSED_BYTES = 1 << 30
MAX_ZSTD_RATIO = 200
"""Training data compress 10 to 50 times."""
_SMALL_BYTES = 64 << 20
"""What any body may unpack to, whatever the ratio."""
_ZSTD_STEP_BYTES = 4096
_PARSE_OFF_LOOP_ABOVE = 100_000
"""Bytes; a 1.3 MB body takes 5 to 30 ms to parse, which would stall every heartbeat."""

Body = TypeVar("Body")


async def read_body(request: Request, *, max_bytes: int = MAX_BODY_BYTES) -> bytes:
    """The body, decompressed when it is zstd; refused as soon as a cap is passed."""
    declared = request.headers.get("content-length")
    if declared is not None and int(declared) > max_bytes:
        raise PayloadTooLarge(f"the body has {declared} bytes, the cap is {max_bytes}")
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > max_bytes:
            raise PayloadTooLarge(f"the body exceeds the cap of {max_bytes} bytes")
        chunks.append(chunk)
    body = b"".join(chunks)
    if request.headers.get("content-encoding", "").lower() == "zstd":
        body = await asyncio.to_thread(decompress_zstd, body)
    return body


def decompress_zstd(body: bytes) -> bytes:
    """All frames of the body, each of them whole: half a frame is half the data of a request.

    PayloadTooLarge as soon as it unpacks to more than any honest request of that size.
    """
    limit = min(MAX_DECOMPRESSED_BYTES, max(_SMALL_BYTES, MAX_ZSTD_RATIO * len(body)))
    parts: list[bytes] = []
    try:
        for part in _decompressed(memoryview(body)):
            parts.append(part)
            limit -= len(part)
            if limit < 0:
                raise PayloadTooLarge(
                    f"the zstd body of {len(body)} bytes unpacks to more than "
                    f"{sum(map(len, parts)) + limit} bytes",
                    hint="send smaller batches, or send the body uncompressed",
                )
    except zstandard.ZstdError as exc:
        raise InvalidArgument(f"the zstd body is damaged: {exc}") from exc
    return b"".join(parts)


def _decompressed(body: memoryview) -> Iterator[bytes]:
    """In small steps, so that a bomb is noticed while it is small."""
    at = 0
    while at < len(body):
        frame = zstandard.ZstdDecompressor().decompressobj()
        while not frame.eof:
            piece = body[at : at + _ZSTD_STEP_BYTES]
            if not piece:
                raise InvalidArgument(
                    "the zstd body ends in the middle of a frame", hint="send it again, whole"
                )
            yield frame.decompress(piece)
            at += len(piece) - len(frame.unused_data)


async def read_json(request: Request, kind: type[Body], *, max_bytes: int = MAX_BODY_BYTES) -> Body:
    """The body as `kind`; unknown fields are ignored, wrong ones named."""
    return await decode_json(await read_body(request, max_bytes=max_bytes) or b"{}", kind)


async def decode_json(body: bytes, kind: type[Body]) -> Body:
    if len(body) > _PARSE_OFF_LOOP_ABOVE:
        return await asyncio.to_thread(parse_json, body, kind)
    return parse_json(body, kind)


def parse_json(body: bytes, kind: type[Body]) -> Body:
    """`decode_json` for callers that are off the event loop already. InvalidArgument names the field."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as exc:
        path = str(exc).rpartition("`$.")[2].rstrip("`") if "`$." in str(exc) else None
        raise InvalidArgument(f"the request body is invalid: {exc}", field=path) from exc
    except msgspec.DecodeError as exc:
        raise InvalidArgument(f"the request body is not JSON: {exc}") from exc


def json_response(
    value: Any, *, status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    return Response(
        msgspec.json.encode(value),
        status_code=status,
        headers=headers,
        media_type="application/json",
    )
