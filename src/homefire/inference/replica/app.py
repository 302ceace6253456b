"""The replica's HTTP application."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from homefire.http.app import service_app
from homefire.http.bodies import json_response, read_json
from homefire.inference.replica.completions import CompletionRoutes
from homefire.inference.replica.replica import Replica
from homefire.inference.replica.tinker_routes import SamplingRoutes
from homefire.wire.errors import InvalidArgument
from homefire.wire.internal import HotLoadRequest, ServiceHealth

_LONGEST_WAIT_S = 60.0


def replica_app(replica: Replica) -> ASGIApp:
    """Serves as soon as it starts; the engine opens meanwhile."""
    spec = replica.spec
    completions = CompletionRoutes(replica)
    sampling = SamplingRoutes(replica)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        replica.start()
        yield
        await replica.stop()

    async def health(request: Request) -> Response:
        return json_response(ServiceHealth(spec.nonce, os.getpid(), "replica"))

    async def status(request: Request) -> Response:
        after, wait_s = _poll(request)
        return json_response(await replica.status_beyond(after, wait_s))

    async def hot_load(request: Request) -> Response:
        return json_response(replica.hot_load(await read_json(request, HotLoadRequest)), status=202)

    routes = [
        *_routes("/completions", completions.completions),
        *_routes("/chat/completions", completions.chat_completions),
        Route("/inference/v1/generate", completions.generate, methods=["POST"]),
        *sampling.routes(),
        Route("/internal/health", health),
        Route("/internal/status", status),
        Route("/internal/hot_load", hot_load, methods=["POST"]),
    ]
    return service_app(routes, secret=spec.listen.secret, lifespan=lifespan)


def _routes(path: str, endpoint: Callable[[Request], Awaitable[Response]]) -> list[Route]:
    """The gateway passes paths on as they came."""
    return [Route(f"{at}{path}", endpoint, methods=["POST"]) for at in ("/inference/v1", "/v1")]


def _poll(request: Request) -> tuple[int | None, float]:
    """`after` and `wait_s` of a long poll."""
    query = request.query_params
    try:
        after = int(query["after"]) if "after" in query else None
        wait_s = float(query.get("wait_s", 0))
    except ValueError as exc:
        raise InvalidArgument(f"after and wait_s are numbers: {exc}") from exc
    return after, min(max(wait_s, 0.0), _LONGEST_WAIT_S)
