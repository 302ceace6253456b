"""Collections of the hosted service that have no counterpart here, each refused by its name.

Without these a client would hear "no such route", and not which of its features is missing.
"""

from __future__ import annotations

import re

from starlette.convertors import StringConvertor, register_url_convertor
from starlette.requests import Request
from starlette.responses import Response

from homefire.control.endpoints import Endpoint
from homefire.control.plane import ControlPlane
from homefire.control.routes.accounts import own_account
from homefire.wire.errors import Unsupported

_OWN_LOOP = "drive a trainer job from your own loop; its checkpoints list and promote likewise"
_HINTS = {
    "supervisedFineTuningJobs": _OWN_LOOP,
    "dpoJobs": _OWN_LOOP,
    "reinforcementFineTuningJobs": _OWN_LOOP,
    "trainingSessions": "use the Tinker client at the server's root: sessions and runs are its own",
    "datasets": "keep data on the client: batches travel with forward_backward",
    "evaluators": "evaluate on the client, and record results at /evaluations",
    "evaluationJobs": "evaluate on the client, and record results at /evaluations",
    "batchInferenceJobs": "send completions; many at once are batched",
    "deployedModels": "hot-load the adapter's snapshot into a deployment",
    "deploymentShapes": "a deployment needs no shape here",
}
_METHODS = ("GET", "POST", "PATCH", "DELETE")


class HostedConvertor(StringConvertor):
    """`{hosted:hosted}` in a path: one of these collections, and whatever follows."""

    regex = rf"(?:{'|'.join(_HINTS)})(?:[/:].*)?"


register_url_convertor("hosted", HostedConvertor())


async def refuse(plane: ControlPlane, request: Request) -> Response:
    own_account(request)
    collection = re.split("[/:]", request.path_params["hosted"])[0]
    raise Unsupported(
        f"{collection} belong to the hosted service and are not supported",
        hint=_HINTS[collection],
        field=collection,
    )


ENDPOINTS = [
    Endpoint(method, "/v1/accounts/{account}/{hosted:hosted}", refuse, "Refused by name")
    for method in _METHODS
]
