"""Routes for our own services."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from homefire.control.endpoints import Endpoint
from homefire.control.paging import integer
from homefire.control.plane import ControlPlane
from homefire.foundation.process import this_process
from homefire.http.bodies import json_response, read_json
from homefire.wire.errors import InvalidArgument, Unavailable
from homefire.wire.internal import (
    NewRun,
    RouteTable,
    RunPlace,
    SamplerPlace,
    ServiceHealth,
    SnapshotRef,
    Wake,
)

LONGEST_WAIT_S = 25.0
FIRST_TABLE_WAIT_S = 1.5
"""Below the gateway's own patience (`_REFRESH_TIMEOUT_S`)."""


async def health(plane: ControlPlane, request: Request) -> Response:
    return json_response(ServiceHealth(plane.spec.nonce, this_process().pid, "control"))


async def routes(plane: ControlPlane, request: Request) -> Response:
    """The table as soon as its version is not `after`, else after `wait_s`.

    Unavailable until the first look at the rows: an empty table would make the gateway deny, to
    clients that wait, jobs that exist.
    """
    if not await plane.has_looked(within_s=FIRST_TABLE_WAIT_S):
        raise Unavailable("control is starting", hint="ask again")
    query = request.query_params
    after = integer(query, "after", default=-1)
    wait_s = 0.0 if plane.stopping else _seconds(query.get("wait_s"))
    _, table = await plane.routes.wait_beyond(after=None if after < 0 else after, timeout_s=wait_s)
    return json_response(table)


async def place_run(plane: ControlPlane, request: Request) -> Response:
    """A root session creates a model: which job trains it, found, made or woken up."""
    new = await read_json(request, NewRun)
    place = await plane.tinker.runs.place(new)
    await plane.until_route_is_current(new.account, place.job)
    return json_response(place)


async def find_run(plane: ControlPlane, request: Request) -> Response:
    account = request.query_params.get("account", "")
    return json_response(await plane.tinker.runs.find(account, request.path_params["run"]))


async def place_snapshot(plane: ControlPlane, request: Request) -> Response:
    """Which sampler serves a snapshot: found, made or woken up."""
    asked = await read_json(request, SnapshotRef)
    sampler = await plane.tinker.samplers.place(asked.account, asked.path)
    await plane.until_route_is_current(asked.account, sampler)
    return json_response(SamplerPlace(sampler))


async def wake(plane: ControlPlane, request: Request) -> Response:
    await plane.tinker.wake(await read_json(request, Wake))
    return json_response({})


async def wake_deployment(plane: ControlPlane, request: Request) -> Response:
    asked = await read_json(request, Wake)
    await plane.deployments.wake(asked.account, asked.service)
    return json_response({})


def _seconds(text: str | None) -> float:
    try:
        seconds = float(text or 0.0)
    except ValueError as exc:
        raise InvalidArgument(f"wait_s {text!r} is not a number", field="wait_s") from exc
    return min(max(seconds, 0.0), LONGEST_WAIT_S) if seconds == seconds else 0.0


ENDPOINTS = [
    Endpoint("GET", "/internal/health", health, "Which process answers", ServiceHealth),
    Endpoint(
        "GET",
        "/internal/routes",
        routes,
        "The gateway's routing table",
        RouteTable,
        query=("after", "wait_s"),
    ),
    Endpoint(
        "POST", "/internal/tinker/runs", place_run, "The job of a new run", RunPlace, body=NewRun
    ),
    Endpoint(
        "GET",
        "/internal/tinker/runs/{run}",
        find_run,
        "The job of a run",
        RunPlace,
        query=("account",),
    ),
    Endpoint(
        "POST",
        "/internal/tinker/samplers",
        place_snapshot,
        "The sampler of a snapshot",
        SamplerPlace,
        body=SnapshotRef,
    ),
    Endpoint(
        "POST", "/internal/tinker/wake", wake, "A request came for something parked", body=Wake
    ),
    Endpoint(
        "POST",
        "/internal/deployments/wake",
        wake_deployment,
        "A request came for a deployment that was scaled to zero",
        body=Wake,
    ),
]
