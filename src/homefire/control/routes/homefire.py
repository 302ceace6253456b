"""Routes of our own: status, logs, the catalog."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import Response

from homefire.control.endpoints import Endpoint
from homefire.control.paging import integer
from homefire.control.plane import ControlPlane
from homefire.control.service_logs import SERVICES, deployment_log, job_log, service_log
from homefire.http.app import account_of
from homefire.http.bodies import json_response
from homefire.wire.errors import InvalidArgument, NotFound
from homefire.wire.records import LogReport, StatusReport
from homefire.wire.resources import ModelList, TrainingShapeVersionList

DEFAULT_TAIL = 200
LONGEST_TAIL = 10_000


async def status(plane: ControlPlane, request: Request) -> Response:
    return json_response(await plane.status(account_of(request)))


async def logs(plane: ControlPlane, request: Request) -> Response:
    account, name = account_of(request), request.path_params["name"]
    lines = integer(request.query_params, "tail", default=DEFAULT_TAIL)
    if not 0 < lines <= LONGEST_TAIL:
        raise InvalidArgument(f"tail {lines} is not between 1 and {LONGEST_TAIL}", field="tail")
    return json_response(LogReport(name, await _lines(plane, account, name, lines=lines)))


async def models(plane: ControlPlane, request: Request) -> Response:
    account_of(request)
    return json_response(ModelList(models=await plane.models.list()))


async def shapes(plane: ControlPlane, request: Request) -> Response:
    account_of(request)
    return json_response(
        TrainingShapeVersionList(training_shape_versions=await plane.models.shapes())
    )


async def _lines(plane: ControlPlane, account: str, name: str, *, lines: int) -> list[str]:
    if name in SERVICES:
        return await asyncio.to_thread(service_log, plane.home, name, lines=lines)
    jobs = {job.id for job in await plane.jobs.list(account)}
    if name in jobs:
        return await asyncio.to_thread(job_log, plane.home, name, lines=lines)
    deployments = {row.id for row in await plane.deployments.list(account)}
    if name in deployments:
        return await asyncio.to_thread(deployment_log, plane.home, name, lines=lines)
    known = ", ".join([*SERVICES, *sorted(jobs), *sorted(deployments)])
    raise NotFound(f"nothing called {name!r} writes a log", hint=f"what does: {known}")


ENDPOINTS = [
    Endpoint("GET", "/v1/homefire/status", status, "Everything at a glance", StatusReport),
    Endpoint(
        "GET",
        "/v1/homefire/logs/{name}",
        logs,
        "The end of a service's log",
        LogReport,
        query=("tail",),
    ),
    Endpoint("GET", "/v1/homefire/models", models, "The catalog", ModelList),
    Endpoint(
        "GET",
        "/v1/homefire/shapes",
        shapes,
        "The generated training shapes",
        TrainingShapeVersionList,
    ),
]
