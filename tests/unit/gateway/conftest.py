"""A gateway between an httpx client and small upstream services on real Unix sockets."""

from __future__ import annotations

import asyncio
import hashlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import msgspec
import pytest
import uvicorn
from aiohttp import web

from homefire.gateway.app import gateway_app
from homefire.gateway.routing import Holds
from homefire.wire.internal import (
    DeploymentRoute,
    KeyRoute,
    RouteTable,
    TrainerRoute,
)
from homefire.wire.specs import GatewaySpec, Upstream

KEY = "tml-of-local"
OTHER_KEY = "tml-of-other"
PLAIN_KEY = "fw_plain"
Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


def hashed(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


KEYS = [
    KeyRoute(hashed(KEY), "local"),
    KeyRoute(hashed(OTHER_KEY), "other"),
    KeyRoute(hashed(PLAIN_KEY), "local"),
]


async def echo(request: web.Request) -> web.StreamResponse:
    """Answers with what arrived, so that a test sees what the gateway made of its request."""
    body = await request.read()
    return web.json_response(
        {
            "method": request.method,
            "path": request.path_qs,
            "headers": {name.lower(): value for name, value in request.headers.items()},
            "body": body.decode("latin-1"),
        }
    )


class Service:
    """An upstream on a Unix socket that can be stopped and started again."""

    def __init__(self, upstream: Upstream, answer: Answer) -> None:
        self.upstream = upstream
        self.requests: list[str] = []
        self._answer = answer
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", self._record)
        self._runner = web.AppRunner(
            app, handler_cancellation=True, shutdown_timeout=0.1, auto_decompress=False
        )
        await self._runner.setup()
        await web.UnixSite(self._runner, self.upstream.socket).start()

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _record(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(f"{request.method} {request.path_qs}")
        return await self._answer(request)


class Control:
    """Control as the gateway sees it: the routing table by long poll, and an echo of the rest."""

    def __init__(self, upstream: Upstream) -> None:
        self.table = RouteTable(version=1, keys=KEYS)
        self._changed = asyncio.Event()
        self.answer_root: Answer = echo
        """What control says to the gateway's own questions about the root plane."""
        self.service = Service(upstream, self._answer)

    def publish(self, **changes: Any) -> None:
        fields = {name: getattr(self.table, name) for name in self.table.__struct_fields__}
        self.table = RouteTable(**{**fields, "version": self.table.version + 1, **changes})
        self._changed.set()
        self._changed = asyncio.Event()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        if request.path.startswith(("/internal/tinker/", "/internal/deployments/")):
            return await self.answer_root(request)
        if request.path != "/internal/routes":
            return await echo(request)
        if request.query.get("after") == str(self.table.version):
            await self._changed.wait()
        return web.Response(body=msgspec.json.encode(self.table))


class Stack:
    """The gateway under test with everything around it."""

    def __init__(self, directory: Path, exit_stack: AsyncExitStack) -> None:
        self.directory = directory
        self._exit = exit_stack
        self.control = Control(Upstream(str(directory / "control.sock"), "control-secret"))
        (directory / "run").mkdir()
        self.spec = GatewaySpec(
            home=str(directory),
            nonce="gateway-nonce",
            host="127.0.0.1",
            port=8700,
            listen=Upstream(str(directory / "gateway.sock"), "gateway-secret"),
            control=self.control.service.upstream,
            allowed_hosts=["homefire.example:8700"],
        )
        self.app = gateway_app(
            self.spec, holds=Holds(request_s=0.0, future_s=0.0, look_again_s=5.0)
        )

    async def service(self, name: str, answer: Answer = echo) -> Service:
        service = Service(Upstream(str(self.directory / f"{name}.sock"), f"{name}-secret"), answer)
        await service.start()
        self._exit.push_async_callback(service.stop)
        return service

    async def trainer(self, job: str = "job-1", answer: Answer = echo) -> Service:
        service = await self.service(job, answer)
        self.route_trainer(job, service.upstream)
        return service

    def route_trainer(
        self,
        job: str,
        upstream: Upstream | None,
        state: str = "JOB_STATE_RUNNING",
        detail: str = "",
    ) -> None:
        routes = {
            **self.control.table.trainers,
            f"local/{job}": TrainerRoute(state, upstream, detail),
        }
        self.control.publish(trainers=routes)

    async def replica(self, deployment: str = "dep", answer: Answer = echo) -> Service:
        index = len(list(self.directory.glob(f"{deployment}-*.sock")))
        service = await self.service(f"{deployment}-{index}", answer)
        known = self.control.table.deployments.get(f"local/{deployment}")
        replicas = [*(known.replicas if known else []), service.upstream]
        self.route_deployment(deployment, replicas)
        return service

    def route_deployment(
        self,
        deployment: str,
        replicas: list[Upstream],
        state: str = "READY",
        account: str = "local",
        detail: str = "",
        is_asleep: bool = False,
    ) -> None:
        routes = {
            **self.control.table.deployments,
            f"{account}/{deployment}": DeploymentRoute(
                state, replicas, detail, is_asleep=is_asleep
            ),
        }
        self.control.publish(deployments=routes)

    def use_holds(self, holds: Holds) -> None:
        """Only before `start`."""
        self.app = gateway_app(self.spec, holds=holds)

    async def start(self, *, key: str | None = KEY) -> httpx.AsyncClient:
        """The gateway in process, without a server of its own: fast, but not streaming."""
        await self._start_control()
        await self._exit.enter_async_context(_lifespan(self.app))
        return await self.client(httpx.ASGITransport(app=self.app), key=key)

    async def client(
        self, transport: httpx.AsyncBaseTransport, *, key: str | None = KEY
    ) -> httpx.AsyncClient:
        headers = {} if key is None else {"x-api-key": key}
        return await self._exit.enter_async_context(
            httpx.AsyncClient(
                transport=transport, base_url="http://127.0.0.1:8700", headers=headers
            )
        )

    async def serve(self) -> aiohttp.ClientSession:
        """The gateway on a real port; the socket listens before the server is up."""
        await self._start_control()
        listening = socket.create_server(("127.0.0.1", 0))
        self.host, self.port = listening.getsockname()
        url = f"http://{self.host}:{self.port}"
        server = uvicorn.Server(
            uvicorn.Config(self.app, lifespan="on", log_config=None, http="httptools")
        )
        serving = asyncio.create_task(server._serve([listening]))

        async def stop() -> None:
            server.should_exit = True
            await serving

        self._exit.push_async_callback(stop)
        return await self._exit.enter_async_context(
            aiohttp.ClientSession(base_url=url, headers={"x-api-key": KEY})
        )

    async def _start_control(self) -> None:
        await self.control.service.start()
        self._exit.push_async_callback(self.control.service.stop)


class _lifespan:
    """Runs an ASGI application's lifespan as a server would."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._to_app: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._from_app: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    async def __aenter__(self) -> None:
        scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}
        self._task = asyncio.create_task(self._app(scope, self._to_app.get, self._from_app.put))
        await self._to_app.put({"type": "lifespan.startup"})
        assert (await self._from_app.get())["type"] == "lifespan.startup.complete"

    async def __aexit__(self, *_: object) -> None:
        await self._to_app.put({"type": "lifespan.shutdown"})
        await self._task


@pytest.fixture
async def stack(tmp_path: Path) -> AsyncIterator[Stack]:
    async with AsyncExitStack() as exit_stack:
        yield Stack(tmp_path, exit_stack)
