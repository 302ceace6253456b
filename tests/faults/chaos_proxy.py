"""Between a client and a trainer's front: loses, doubles, holds, cuts and reorders, and writes down all it saw.

What happens to the n-th request of a name is drawn from the seed, the name and n alone, so a schedule
is the same however the machine is loaded. Nothing waits for time: what is held goes on when another
request has been answered, or when nothing else is under way.
"""

from __future__ import annotations

import asyncio
import json
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import aiohttp
from aiohttp import web

from contract.lossy_proxy import model_and_seq_id

_HOP_BY_HOP = {"host", "connection", "content-length", "transfer-encoding", "keep-alive"}
_POLL = "retrieve_future"
_UNTOUCHED = frozenset(
    {"session_heartbeat", "telemetry", "config", "get_server_capabilities", "healthz"}
)


class Mischief(StrEnum):
    DROP = "drop"
    """The request never arrives; the client's connection is reset."""
    LOSE = "lose"
    """It arrives and is answered; the answer is lost, the connection reset."""
    DOUBLE = "double"
    """It arrives twice, side by side."""
    DELAY = "delay"
    """It is held back until another one was answered."""
    REORDER = "reorder"
    """Its answer is held back until another one was answered."""
    CUT = "cut"
    """The connection is reset in the middle of the answer."""


def drawn(seed: int, *, share: float) -> Callable[[str, int], Mischief | None]:
    """Each kind as often as another, to one request in `1/share`."""

    def mischief(name: str, number: int) -> Mischief | None:
        dice = random.Random(f"{seed}:{name}:{number}")
        return dice.choice(list(Mischief)) if dice.random() < share else None

    return mischief


@dataclass(frozen=True)
class Exchange:
    """One request that reached the front and was answered by it, whether the client learned of it or not."""

    name: str
    body: bytes
    content_type: str
    accept: str
    status: int
    answer: bytes

    @property
    def key(self) -> tuple[str, str, int] | None:
        """Call, model and number of a training call."""
        if self.name in (_POLL, "create_model") or self.status != 200:
            return None
        try:
            model, seq = model_and_seq_id(self.content_type, self.body)
        except (KeyError, ValueError):
            return None
        return self.name, model, seq

    @property
    def request_id(self) -> str | None:
        """Of an acknowledgement."""
        if self.name == _POLL or self.status != 200:
            return None
        try:
            return json.loads(self.answer).get("request_id")
        except ValueError:
            return None


@dataclass
class ChaosProxy:
    socket: str
    """Of the front."""
    secret: str
    mischief: Callable[[str, int], Mischief | None] = lambda name, number: None
    url: str = ""
    exchanges: list[Exchange] = field(default_factory=list)
    done: Counter[Mischief] = field(default_factory=Counter)
    _numbers: Counter[str] = field(default_factory=Counter)
    _under_way: int = 0
    _held: list[asyncio.Event] = field(default_factory=list)

    async def serve(self, started: threading.Event, stop: asyncio.Event) -> None:
        connector = aiohttp.UnixConnector(path=self.socket, limit=0, force_close=True)
        timeout = aiohttp.ClientTimeout(total=120)
        async with aiohttp.ClientSession(
            connector=connector, auto_decompress=False, timeout=timeout
        ) as session:

            async def answer(request: web.Request) -> web.StreamResponse:
                return await self._answer(session, request)

            app = web.Application(client_max_size=1 << 28)
            app.router.add_route("*", "/{path:.*}", answer)
            runner = web.AppRunner(app, handler_cancellation=False, shutdown_timeout=0.1)
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
        name, body = request.path.rpartition("/")[2], await request.read()
        if name in _UNTOUCHED:
            return await self._forward(session, request, name, body)
        self._numbers[name] += 1
        mischief = self.mischief(name, self._numbers[name])
        if mischief is not None:
            self.done[mischief] += 1
        counts = name != _POLL
        self._under_way += counts
        try:
            return await self._with(mischief, session, request, name, body)
        finally:
            self._under_way -= counts
            self._release()

    async def _with(
        self,
        mischief: Mischief | None,
        session: aiohttp.ClientSession,
        request: web.Request,
        name: str,
        body: bytes,
    ) -> web.StreamResponse:
        match mischief:
            case Mischief.DROP:
                return _reset(request)
            case Mischief.LOSE:
                await self._forward(session, request, name, body)
                return _reset(request)
            case Mischief.DOUBLE:
                both = [self._forward(session, request, name, body) for _ in range(2)]
                return (await asyncio.gather(*both))[0]
            case Mischief.DELAY:
                await self._hold()
                return await self._forward(session, request, name, body)
            case Mischief.REORDER:
                answer = await self._forward(session, request, name, body)
                await self._hold()
                return answer
            case Mischief.CUT:
                answer = await self._forward(session, request, name, body)
                return await _cut(request, answer)
            case None:
                return await self._forward(session, request, name, body)

    async def _forward(
        self, session: aiohttp.ClientSession, request: web.Request, name: str, body: bytes
    ) -> web.Response:
        headers = {k: v for k, v in request.headers.items() if k.lower() not in _HOP_BY_HOP}
        headers["x-homefire-secret"] = self.secret
        url = f"http://front{request.path_qs}"
        try:
            async with session.request(request.method, url, data=body, headers=headers) as response:
                content = await response.read()
                kept = {k: v for k, v in response.headers.items() if k.lower() not in _HOP_BY_HOP}
        except aiohttp.ClientError:
            return _while_down(request, name, body)
        seen = (request.content_type, request.headers.get("accept", ""))
        self.exchanges.append(Exchange(name, body, *seen, response.status, content))
        return web.Response(body=content, status=response.status, headers=kept)

    async def _hold(self) -> None:
        released = asyncio.Event()
        self._held.append(released)
        if self._under_way <= len(self._held):
            self._release()
        await released.wait()

    def _release(self) -> None:
        if self._held:
            self._held.pop(0).set()


def _while_down(request: web.Request, name: str, body: bytes) -> web.Response:
    """As the gateway stands in for a front that is down; a call is cut, to be sent again."""
    if name == _POLL:
        again = {
            "type": "try_again",
            "request_id": _request_id(body),
            "queue_state": "paused_capacity",
        }
        return web.json_response(again, status=408)
    if name == "session_heartbeat":
        return web.json_response({"type": "session_heartbeat"})
    return _reset(request)


def _reset(request: web.Request) -> web.Response:
    if request.transport is not None:
        request.transport.abort()
    return web.Response()


async def _cut(request: web.Request, answer: web.Response) -> web.StreamResponse:
    content = answer.body if isinstance(answer.body, bytes) else b""
    cut = web.StreamResponse(status=answer.status, headers=answer.headers)
    cut.content_length = len(content)
    if request.transport is not None and not request.transport.is_closing():
        await cut.prepare(request)
        await cut.write(content[: len(content) // 2])
        request.transport.abort()
    return cut


def _request_id(body: bytes) -> str:
    return str(json.loads(body).get("request_id", ""))


@contextmanager
def chaos_proxy(socket: str, secret: str, **options: Any) -> Iterator[ChaosProxy]:
    proxy = ChaosProxy(socket, secret, **options)
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


__all__ = ["ChaosProxy", "Exchange", "Mischief", "chaos_proxy", "drawn"]
