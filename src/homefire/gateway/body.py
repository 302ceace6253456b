"""A request's body on its way through the gateway: streamed, or read whole where `model` is needed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from homefire.wire.errors import PayloadTooLarge

_SLICE_BYTES = 256 << 10


class RequestBody:
    """Owns the ASGI `receive` of one request. Nothing is read before `begin`.

    A body that came in one message (nearly all do) is `whole` and can be sent again; a longer one
    is streamed and can be sent once.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._head: bytes | None = None
        self._ended = asyncio.Event()
        self._client_gone = False

    async def begin(self) -> None:
        """Waits for the first bytes; does nothing the second time."""
        if self._head is None:
            self._head = await self._next()

    def outgoing(self) -> bytes | AsyncIterator[bytes]:
        """What to send upstream: the bytes when they are all here, else a stream of them.

        A stream that was never started took nothing, so that another may be asked for.
        """
        head = self._head or b""
        if not self._ended.is_set():
            return self._stream(head)
        return head if len(head) <= _SLICE_BYTES else _slices(head)

    async def read(self, *, max_bytes: int) -> bytes:
        """The whole body, kept for `outgoing`; refused as soon as the cap is passed."""
        await self.begin()
        chunks = [self._head or b""]
        size = len(chunks[0])
        while size <= max_bytes and not self._ended.is_set():
            chunks.append(await self._next())
            size += len(chunks[-1])
        if size > max_bytes:
            raise PayloadTooLarge(f"the body exceeds the cap of {max_bytes} bytes")
        self._head = b"".join(chunks)
        return self._head

    def replace(self, content: bytes) -> None:
        """Sends `content` instead of what `read` returned."""
        self._head = content

    async def client_gone(self) -> None:
        """Returns when the client has hung up; until then it blocks."""
        await self._ended.wait()
        while not self._client_gone:
            self._client_gone = (await self._receive())["type"] == "http.disconnect"

    async def _stream(self, head: bytes) -> AsyncIterator[bytes]:
        yield head
        while not self._ended.is_set():
            yield await self._next()

    async def _next(self) -> bytes:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self._client_gone = True
            self._ended.set()
            raise ClientDisconnect
        if not message.get("more_body", False):
            self._ended.set()
        return message.get("body", b"")


async def _slices(body: bytes) -> AsyncIterator[bytes]:
    """A large body in pieces, so that writing it does not hold up everything else."""
    for start in range(0, len(body), _SLICE_BYTES):
        yield body[start : start + _SLICE_BYTES]
