"""The hot-load protocol (Fireworks' shape). The deployment is named by a header."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from homefire.control.endpoints import Endpoint
from homefire.control.hot_loads import check_drain_timeout, hot_load_status
from homefire.control.plane import ControlPlane
from homefire.http.app import account_of
from homefire.http.bodies import json_response, read_json
from homefire.wire.errors import InvalidArgument
from homefire.wire.resources import HotLoadSignal, HotLoadStatus

DEPLOYMENT_HEADER = "fireworks-deployment"
DRAIN_HEADER = "x-fireworks-hot-load-drain-timeout"
_PATH = "/hot_load/v1/models/hot_load"
_HEADERS = (DEPLOYMENT_HEADER, "fireworks-model")


class HotLoadAccepted(msgspec.Struct, frozen=True):
    status: str = "accepted"
    identity: str | None = None


async def signal(plane: ControlPlane, request: Request) -> Response:
    """Answers at once; the replicas load in the background. A deployment scaled to zero starts for it."""
    asked = _with_header(await read_json(request, HotLoadSignal), request)
    account = account_of(request)
    deployment = await plane.hot_loads.signal(account, _deployment(request), asked)
    await plane.deployments.wake(account, deployment.id)
    return json_response(HotLoadAccepted(identity=asked.identity))


async def status(plane: ControlPlane, request: Request) -> Response:
    """Held while a load is in progress."""
    view = await plane.held_hot_load(account_of(request), _deployment(request))
    return json_response(hot_load_status(view.row, view.seen))


def _with_header(asked: HotLoadSignal, request: Request) -> HotLoadSignal:
    """The hosted protocol has the drain's time in a header; the body's field wins."""
    text = request.headers.get(DRAIN_HEADER)
    if text is None or asked.drain_timeout_s is not None:
        return asked
    try:
        seconds = float(text)
    except ValueError as exc:
        raise InvalidArgument(
            f"{DRAIN_HEADER} {text!r} is not a number of seconds", field=DRAIN_HEADER
        ) from exc
    check_drain_timeout(seconds, field=DRAIN_HEADER)
    return msgspec.structs.replace(asked, drain_timeout_s=seconds)


def _deployment(request: Request) -> str:
    return request.headers.get(DEPLOYMENT_HEADER, "")


ENDPOINTS = [
    Endpoint(
        "POST",
        _PATH,
        signal,
        "Serve this snapshot from now on",
        HotLoadAccepted,
        HotLoadSignal,
        headers=(*_HEADERS, DRAIN_HEADER),
    ),
    Endpoint(
        "GET",
        _PATH,
        status,
        "What each replica serves; held while a load is in progress",
        HotLoadStatus,
        headers=_HEADERS,
    ),
]
