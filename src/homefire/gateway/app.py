"""The gateway's routes: which path goes to which plane."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp

from homefire.foundation.clock import Clock, SystemClock
from homefire.foundation.home import Home
from homefire.gateway.caller import Plane
from homefire.gateway.control_calls import ControlCalls
from homefire.gateway.control_plane import ControlPlane
from homefire.gateway.hosts import HostList
from homefire.gateway.inference_plane import InferencePlane
from homefire.gateway.proxy import Proxy
from homefire.gateway.root_plane import RootPlane
from homefire.gateway.root_samplers import RootSamplers
from homefire.gateway.root_trainers import RootTrainers
from homefire.gateway.route_feed import RouteFeed, read_saved_table
from homefire.gateway.routing import Holds, Router
from homefire.gateway.shell import GatewayShell
from homefire.gateway.trainers import Trainers
from homefire.gateway.training_plane import TrainingPlane
from homefire.gateway.upstreams import Upstreams
from homefire.http.app import answer_error
from homefire.http.bodies import json_response
from homefire.wire.errors import HomefireError, Unsupported
from homefire.wire.internal import DOWNLOADS_PATH, ServiceHealth
from homefire.wire.specs import GatewaySpec


def gateway_app(
    spec: GatewaySpec, *, clock: Clock | None = None, holds: Holds | None = None
) -> ASGIApp:
    """The whole gateway as one ASGI application; its lifespan runs the route feed."""
    upstreams = Upstreams()
    feed = RouteFeed(
        spec.control, upstreams, saved=read_saved_table(Home(Path(spec.home)).routes_file)
    )
    clock, holds = clock or SystemClock(), holds or Holds()
    router = Router(feed, Proxy(upstreams), clock, holds)
    calls = ControlCalls(feed, clock, holds)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncGenerator[None]:
        following = asyncio.create_task(feed.follow())
        try:
            yield
        finally:
            following.cancel()
            await asyncio.wait({following})
            await calls.close()
            await upstreams.close()

    app = Starlette(
        routes=gateway_routes(router, upstreams, calls, nonce=spec.nonce),
        lifespan=lifespan,
        exception_handlers={
            HomefireError: answer_error,
            HTTPException: answer_error,
            Exception: answer_error,
        },
    )
    return GatewayShell(
        app,
        secret=spec.listen.secret,
        hosts=HostList([spec.host, *spec.allowed_hosts]),
        keys=lambda: feed.keys(wait_s=router.holds.request_s),
    )


def gateway_routes(
    router: Router, upstreams: Upstreams, calls: ControlCalls, *, nonce: str
) -> list[BaseRoute]:
    control_plane, trainers = ControlPlane(router), Trainers(router)
    root_plane = RootPlane(
        trainers=RootTrainers(trainers, calls, upstreams),
        samplers=RootSamplers(router, calls, upstreams),
        control=control_plane,
        calls=calls,
    )
    control = Plane(control_plane.answer)
    root = Plane(root_plane.answer)
    training = Plane(TrainingPlane(trainers, calls).answer)
    inference = Plane(InferencePlane(router, calls, upstreams).answer)

    async def internal_health(_: Request) -> Response:
        return json_response(ServiceHealth(nonce=nonce, pid=os.getpid(), service="gateway"))

    return [
        Route("/training/v1/rlorTrainerJobs/{account}/{job}/api/v1/{operation:path}", training),
        Route("/inference/v1/completions", inference),
        Route("/inference/v1/chat/completions", inference),
        Route("/inference/v1/generate", inference),
        Route("/v1/completions", inference),
        Route("/v1/chat/completions", inference),
        Route("/inference/v1/models", control),
        Route("/inference/v1/models/{model:path}", control),
        Route("/hot_load/v1/models/hot_load", control),
        Route("/v1/{path:path}", control),
        Route(f"{DOWNLOADS_PATH}/{{path:path}}", control),
        Route("/api/v1/{operation:path}", root),
        Route("/training/v1/serverless/{path:path}", _refuse_serverless, methods=_EVERY_METHOD),
        Route("/healthz", _healthz),
        Route("/internal/health", internal_health),
    ]


_EVERY_METHOD = ["GET", "POST", "PUT", "PATCH", "DELETE"]


async def _healthz(_: Request) -> Response:
    return json_response({"status": "ok"})


async def _refuse_serverless(request: Request) -> Response:
    raise Unsupported(
        f"{request.url.path}: serverless training is the hosted service's",
        hint="use the root Tinker plane at /api/v1, or create a trainer job",
    )
