"""Runs an ASGI application on a Unix socket or a TCP address until SIGTERM."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import FrameType

import uvicorn
from starlette.types import ASGIApp


def serve_unix(app: ASGIApp, *, socket: str, backlog: int = 4096) -> None:
    """Blocks. The socket file is replaced, and lies in a 0700 directory (see `Home.socket`)."""
    Path(socket).unlink(missing_ok=True)
    os.umask(0o077)
    uvicorn.run(app, uds=socket, backlog=backlog, **_COMMON)


def serve_tcp(
    app: ASGIApp,
    *,
    host: str,
    port: int,
    certificate: str | None = None,
    key: str | None = None,
    backlog: int = 4096,
) -> None:
    uvicorn.run(
        app,
        host=host,
        port=port,
        ssl_certfile=certificate,
        ssl_keyfile=key,
        backlog=backlog,
        **_COMMON,
    )


def serve_descriptor(
    app: ASGIApp,
    *,
    descriptor: int,
    certificate: str | None = None,
    key: str | None = None,
    graceful_s: int = 10,
) -> None:
    """The same on an inherited socket that listens already and outlives this process.

    Requests that still run `graceful_s` seconds after SIGTERM are cut off.
    """
    options = {**_COMMON, "timeout_graceful_shutdown": graceful_s}
    config = uvicorn.Config(app, ssl_certfile=certificate, ssl_keyfile=key, **options)
    uvicorn.Server(config).run(sockets=[socket.socket(fileno=descriptor)])


OnStop = Callable[[], Awaitable[None]]


def serve_unix_until_stopped(
    app: ASGIApp, *, socket: str, on_stop: OnStop, backlog: int = 4096
) -> None:
    """Blocks until SIGTERM or SIGINT; then awaits `on_stop` while still serving, and returns.

    So a service can finish what it is doing, and the process exits with 0. A second signal does not
    wait for `on_stop`.
    """
    Path(socket).unlink(missing_ok=True)
    os.umask(0o077)
    _StoppingServer(uvicorn.Config(app, uds=socket, backlog=backlog, **_COMMON), on_stop).run()


class _StoppingServer(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, on_stop: OnStop) -> None:
        super().__init__(config)
        self._on_stop = on_stop
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Future[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._stop is not None or self._loop is None:
            super().handle_exit(sig, frame)
        else:
            self._loop.call_soon_threadsafe(self._begin_stop)

    def _begin_stop(self) -> None:
        if self._stop is None:
            self._stop = asyncio.ensure_future(self._finish())

    async def _finish(self) -> None:
        try:
            await self._on_stop()
        finally:
            self.should_exit = True


_COMMON = {
    "log_config": None,
    "access_log": False,
    "lifespan": "on",
    "loop": "uvloop",
    "http": "httptools",
    "timeout_graceful_shutdown": 10,
    "timeout_keep_alive": 75,
    "server_header": False,
}
