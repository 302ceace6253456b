"""One request of an authenticated client, and what the planes do with it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from homefire.gateway.body import RequestBody
from homefire.http.bodies import json_response


class Caller:
    """The request as the shell let it in: `account` and `request_id` are the gateway's own words."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope = scope
        self.body = RequestBody(receive)
        self.headers = Headers(scope=scope)
        self.method: str = scope["method"]
        self.account: str = scope["state"]["account"]
        self.request_id: str = scope["state"]["request_id"]
        self._send = send

    @property
    def target(self) -> str:
        """Path and query exactly as the client sent them, percent-encoding included."""
        path: str = self.scope["raw_path"].decode("latin-1")
        query: str = self.scope["query_string"].decode("latin-1")
        return f"{path}?{query}" if query else path

    def path_parameter(self, name: str) -> str:
        return self.scope["path_params"][name]

    def replace_body(self, content: bytes) -> None:
        """Forwards `content` in place of the body that was read whole, with the headers that fit."""
        self.body.replace(content)
        changed = {b"content-length": str(len(content)).encode()}
        self.headers = Headers(
            raw=[(name, changed.get(name, value)) for name, value in self.headers.raw]
        )

    async def start_answer(self, status: int, headers: Iterable[tuple[bytes, bytes]]) -> None:
        await self._send(
            {"type": "http.response.start", "status": status, "headers": list(headers)}
        )

    async def send_chunk(self, chunk: bytes, *, more: bool) -> None:
        await self._send({"type": "http.response.body", "body": chunk, "more_body": more})

    async def answer_json(self, value: Any, *, status: int = 200) -> None:
        response = json_response(value, status=status)
        await self.start_answer(status, response.raw_headers)
        await self.send_chunk(bytes(response.body), more=False)


class Plane:
    """ASGI endpoint of one plane: runs `answer` for as long as the client is there."""

    def __init__(self, answer: Callable[[Caller], Awaitable[None]]) -> None:
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        caller = Caller(scope, receive, send)
        answering = asyncio.ensure_future(self._answer(caller))
        leaving = asyncio.ensure_future(caller.body.client_gone())
        try:
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            answering.cancel()
        # The cancelled answer closes its upstream connection, which frees a generation slot there.
        await asyncio.wait({answering})
        if not answering.cancelled():
            with contextlib.suppress(ClientDisconnect):
                answering.result()
