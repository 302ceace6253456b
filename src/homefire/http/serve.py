"""Runs an ASGI application on a Unix socket or a TCP address until SIGTERM."""

from __future__ import annotations

import os
import socket
from pathlib import Path

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
    app: ASGIApp, *, descriptor: int, certificate: str | None = None, key: str | None = None
) -> None:
    """The same on an inherited socket that listens already and outlives this process."""
    config = uvicorn.Config(app, ssl_certfile=certificate, ssl_keyfile=key, **_COMMON)
    uvicorn.Server(config).run(sockets=[socket.socket(fileno=descriptor)])


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
