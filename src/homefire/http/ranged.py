"""Large bodies out of files: read off the event loop, in bounded chunks, whole or a range of them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from starlette.concurrency import iterate_in_threadpool
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

CHUNK_BYTES = 1 << 20
_RANGE = re.compile(r"^bytes=(\d{0,18})-(\d{0,18})$")


class Piece(Protocol):
    """A stretch of a body. `read` blocks, and any number of threads may call it."""

    @property
    def size(self) -> int: ...

    def read(self, offset: int, length: int) -> bytes:
        """At most `length` bytes, and at least one before the end."""
        ...


@dataclass(frozen=True)
class Bytes:
    data: bytes

    @property
    def size(self) -> int:
        return len(self.data)

    def read(self, offset: int, length: int) -> bytes:
        return self.data[offset : offset + length]


class OpenFile:
    """A file that can be deleted meanwhile: it stays readable until the last of us lets go."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)
        self.size = os.fstat(self._descriptor).st_size

    def read(self, offset: int, length: int) -> bytes:
        data = os.pread(self._descriptor, length, offset)
        if not data:
            raise OSError("a file shrank while it was sent")
        return data

    def close(self) -> None:
        os.close(self._descriptor)


@dataclass(frozen=True)
class Body:
    """What is sent, piece after piece."""

    pieces: Sequence[Piece]
    media_type: str
    filename: str
    etag: str
    """Names these very bytes, without quotes."""

    @property
    def size(self) -> int:
        return sum(piece.size for piece in self.pieces)

    def chunks(self, start: int, end: int) -> Iterator[bytes]:
        """Bytes [start, end), in chunks of at most CHUNK_BYTES. Blocks."""
        begins = 0
        for piece in self.pieces:
            first, last = max(start - begins, 0), min(end - begins, piece.size)
            while first < last:
                chunk = piece.read(first, min(CHUNK_BYTES, last - first))
                first += len(chunk)
                yield chunk
            begins += piece.size

    def close(self) -> None:
        for piece in self.pieces:
            if isinstance(piece, OpenFile):
                piece.close()


class _BodyResponse(StreamingResponse):
    """Lets go of the body's files whatever becomes of the client."""

    def __init__(
        self, body: Body, start: int, end: int, status: int, headers: dict[str, str]
    ) -> None:
        self._body = body
        chunks = iterate_in_threadpool(body.chunks(start, end))
        super().__init__(chunks, status, headers, body.media_type)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._body.close()


def ranged_response(request: Request, body: Body) -> Response:
    """The answer to GET or HEAD; takes over `body`. A range that cannot be met is answered with 416,
    one in an unknown unit or of several parts with the whole."""
    headers = {
        "accept-ranges": "bytes",
        "etag": f'"{body.etag}"',
        "content-disposition": f'attachment; filename="{body.filename}"',
        "cache-control": "private, no-store",
    }
    asked = _asked_range(request, body)
    start, end = asked or (0, body.size)
    if asked is not None:
        headers["content-range"] = f"bytes {start}-{end - 1}/{body.size}"
    if start >= end and asked is not None:
        body.close()
        return Response(status_code=416, headers={"content-range": f"bytes */{body.size}"})
    headers["content-length"] = str(end - start)
    status = 200 if asked is None else 206
    if request.method == "HEAD":
        body.close()
        return Response(status_code=status, headers=headers, media_type=body.media_type)
    return _BodyResponse(body, start, end, status, headers)


def _asked_range(request: Request, body: Body) -> tuple[int, int] | None:
    """[start, end) of a `Range` header (RFC 9110, 14.2) that counts; empty when it lies outside."""
    match = _RANGE.match(request.headers.get("range", "").replace(" ", ""))
    if match is None or match.group() == "bytes=-":
        return None
    if request.headers.get("if-range", f'"{body.etag}"') != f'"{body.etag}"':
        return None
    first, last = match.groups()
    if not first:
        return max(body.size - int(last), 0), body.size
    end = min(int(last) + 1, body.size) if last else body.size
    if last and int(last) < int(first):
        return None
    return int(first), end
