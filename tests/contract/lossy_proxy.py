"""Between a client and homefire: loses the answer to the first try of every request it is told to."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import aiohttp
from aiohttp import web

from contract.clients import Server
from homefire.wire import tinker_proto

_HOP_BY_HOP = {"host", "connection", "content-length", "transfer-encoding", "keep-alive"}
_TIMEOUT = aiohttp.ClientTimeout(total=120)


@dataclass
class LossyProxy:
    """A `Server` for `run_client`."""

    upstream: str
    api_key: str
    loses: Mapping[str, int]
    """How many requests lose their first answer, by the last part of the path: {"optim_step": 2}."""
    url: str = ""
    lost: list[str] = field(default_factory=list)
    """Paths, in order."""
    passes: list[tuple[str, int]] = field(default_factory=list)
    """Model and `seq_id` of each `forward_backward` or `forward`, in the order of arrival."""
    _seen: set[tuple[str, bytes]] = field(default_factory=set)

    async def serve(self, started: threading.Event, stop: asyncio.Event) -> None:
        async with aiohttp.ClientSession(auto_decompress=False, timeout=_TIMEOUT) as session:

            async def answer(request: web.Request) -> web.StreamResponse:
                return await self._answer(session, request)

            app = web.Application(client_max_size=1 << 28)
            app.router.add_route("*", "/{path:.*}", answer)
            runner = web.AppRunner(app, handler_cancellation=False)
            await runner.setup()
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
            started.set()
            await stop.wait()
            await runner.cleanup()

    async def _answer(
        self, session: aiohttp.ClientSession, request: web.Request
    ) -> web.StreamResponse:
        body = await request.read()
        name = request.path.rpartition("/")[2]
        self._note_pass(name, request.content_type, body)
        headers = {k: v for k, v in request.headers.items() if k.lower() not in _HOP_BY_HOP}
        url = f"{self.upstream}{request.path_qs}"
        async with session.request(request.method, url, data=body, headers=headers) as response:
            content = await response.read()
            kept = {k: v for k, v in response.headers.items() if k.lower() not in _HOP_BY_HOP}
        first = (name, body) not in self._seen
        self._seen.add((name, body))
        room = self.lost.count(name) < self.loses.get(name, 0)
        if first and room and request.transport is not None:
            self.lost.append(name)
            request.transport.abort()  # homefire did the work, and the client never learns of it
        return web.Response(body=content, status=response.status, headers=kept)

    def _note_pass(self, name: str, content_type: str, body: bytes) -> None:
        if name in ("forward_backward", "forward"):
            self.passes.append(model_and_seq_id(content_type, body))


def model_and_seq_id(content_type: str, body: bytes) -> tuple[str, int]:
    if content_type == tinker_proto.CONTENT_TYPE:
        request = tinker_proto.decode_forward_backward(body)
        return request.model_id, request.seq_id
    fields = json.loads(body)
    return fields["model_id"], fields["seq_id"]


@contextmanager
def lossy_proxy(server: Server, *, loses: Mapping[str, int]) -> Iterator[LossyProxy]:
    proxy = LossyProxy(server.url, server.api_key, loses)
    started = threading.Event()
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()

    def run() -> None:
        loop.run_until_complete(proxy.serve(started, stop))
        loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert started.wait(30)
        yield proxy
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
