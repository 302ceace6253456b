"""Routes for our own services."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from homefire.control.endpoints import Endpoint
from homefire.control.paging import integer
from homefire.control.plane import ControlPlane
from homefire.foundation.process import this_process
from homefire.http.bodies import json_response
from homefire.wire.errors import InvalidArgument
from homefire.wire.internal import RouteTable, ServiceHealth

LONGEST_WAIT_S = 25.0


async def health(plane: ControlPlane, request: Request) -> Response:
    return json_response(ServiceHealth(plane.spec.nonce, this_process().pid, "control"))


async def routes(plane: ControlPlane, request: Request) -> Response:
    """The table as soon as its version is not `after`, else after `wait_s`."""
    query = request.query_params
    after = integer(query, "after", default=-1)
    wait_s = 0.0 if plane.stopping else _seconds(query.get("wait_s"))
    _, table = await plane.routes.wait_beyond(after=None if after < 0 else after, timeout_s=wait_s)
    return json_response(table)


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
]
