"""Fixtures of the SDK's tests: a clock that sleeps by moving, and servers that remember."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl

import httpx
import msgspec
import pytest
import uvicorn
from starlette.types import ASGIApp

from homefire.foundation.clock import ManualClock
from homefire.sdk.waiting import Waiter


@dataclass
class ManualTime:
    """Sleeping moves the clock at once; `slept` holds every pause in seconds."""

    clock: ManualClock = field(default_factory=ManualClock)
    slept: list[float] = field(default_factory=list)

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.clock.advance(seconds)

    async def sleep_async(self, seconds: float) -> None:
        self.sleep(seconds)
        await asyncio.sleep(0)

    @property
    def waiter(self) -> Waiter:
        return Waiter(self.clock, self.sleep)


@pytest.fixture
def manual_time() -> ManualTime:
    return ManualTime()


@dataclass
class Seen:
    """One request, as the wire traces write it."""

    method: str
    path: str
    query: dict[str, str]
    body: Any
    headers: httpx.Headers

    @property
    def line(self) -> str:
        return f"{self.method} {self.path}"


Answer = Any


class ControlStub:
    """A control plane in memory. A route's answer is a dict, (status, dict), an exception, a
    function of the request, or a list of those, of which the last one stays."""

    def __init__(self) -> None:
        self.seen: list[Seen] = []
        self._answers: dict[str, list[Answer]] = {}
        self.on("GET /v1/accounts", {"accounts": [{"name": "accounts/local"}]})

    def on(self, line: str, *answers: Answer) -> None:
        self._answers[line] = list(answers)

    @property
    def transport(self) -> httpx.MockTransport:
        return httpx.MockTransport(self._handle)

    @property
    def lines(self) -> list[str]:
        return [seen.line for seen in self.seen]

    def calls(self, line: str) -> list[Seen]:
        return [seen for seen in self.seen if seen.line == line]

    def _handle(self, request: httpx.Request) -> httpx.Response:
        seen = Seen(
            request.method,
            request.url.path,
            dict(parse_qsl(request.url.query.decode())),
            msgspec.json.decode(request.content) if request.content else None,
            request.headers,
        )
        self.seen.append(seen)
        answers = self._answers.get(seen.line, [(404, {"code": 5, "message": "not found"})])
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        answer = answer(seen) if callable(answer) else answer
        if isinstance(answer, Exception):
            raise answer
        status, body = answer if isinstance(answer, tuple) else (200, answer)
        return httpx.Response(status, json=body)


@pytest.fixture
def control() -> ControlStub:
    return ControlStub()


class ServedApp:
    """An ASGI application on a loopback port, in a thread of its own."""

    def __init__(self, app: ASGIApp) -> None:
        config = uvicorn.Config(
            app, port=0, log_config=None, ws="none", lifespan="off", timeout_graceful_shutdown=1
        )
        self._server = uvicorn.Server(config)
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        assert self._started.wait(10)

    @property
    def url(self) -> str:
        host, port = self._server.servers[0].sockets[0].getsockname()[:2]
        return f"http://{host}:{port}"

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)
        assert not self._thread.is_alive()

    def _serve(self) -> None:
        server, started = self._server, self._started

        async def run() -> None:
            task = asyncio.create_task(server.serve())
            while not server.started:
                await asyncio.sleep(0)
            started.set()
            await task

        asyncio.run(run())


@pytest.fixture(scope="module")
def serve_module() -> Iterator[Callable[[ASGIApp], str]]:
    """Serves an application until the module's tests end, and gives its URL."""
    running: list[ServedApp] = []

    def start(app: ASGIApp) -> str:
        running.append(ServedApp(app))
        return running[-1].url

    yield start
    for served in running:
        served.stop()
