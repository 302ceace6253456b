"""Files of checkpoints behind signed links: the one place that acts for nobody's key."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import Response

from homefire.control.downloads import open_download
from homefire.control.endpoints import Endpoint
from homefire.control.plane import ControlPlane
from homefire.http.ranged import ranged_response
from homefire.wire.internal import DOWNLOADS_PATH


async def download(plane: ControlPlane, request: Request) -> Response:
    """The token says which file; the name behind it is for the client's own use."""
    grant = plane.management.links.read(request.path_params["token"])
    return ranged_response(request, await asyncio.to_thread(open_download, plane.store, grant))


ENDPOINTS = [
    Endpoint(
        "GET",
        f"{DOWNLOADS_PATH}/{{token}}/{{name}}",
        download,
        "A file of a checkpoint, or a tar of it; no key, the link is signed and expires",
        headers=("range",),
    ),
]
