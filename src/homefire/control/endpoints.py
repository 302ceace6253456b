"""One declarative table of routes: Starlette serves it, and the OpenAPI document describes it."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from homefire.control.plane import ControlPlane

LIST_QUERY = ("pageSize", "pageToken", "filter", "orderBy", "readMask", "showDeleted")
"""What a list understands; see `listing.py`. `readMask` may be given: everything is in every answer."""

Answer = Callable[[ControlPlane, Request], Awaitable[Response]]


@dataclass(frozen=True)
class Endpoint:
    """A method on a path. `body` and `answer` are msgspec structs, for the document."""

    method: str
    path: str
    handler: Answer
    summary: str
    answer: Any = None
    body: Any = None
    query: tuple[str, ...] = ()
    headers: tuple[str, ...] = ()


def starlette_routes(plane: ControlPlane, endpoints: Sequence[Endpoint]) -> list[Route]:
    """In the given order: a path with a verb (`{job}:cancel`) comes before the one without."""
    return [
        Route(e.path, functools.partial(e.handler, plane), methods=[e.method]) for e in endpoints
    ]
