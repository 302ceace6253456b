"""The part of the inference plane that needs no replica: what could be asked."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from homefire.control.endpoints import Endpoint
from homefire.control.lifecycle import DEPLOYMENT_LIVE
from homefire.control.plane import ControlPlane
from homefire.http.app import account_of
from homefire.http.bodies import json_response
from homefire.wire.ids import deployment_name


class ServedModel(msgspec.Struct, frozen=True):
    """A model as the OpenAI protocol lists it; `id` is what a request names."""

    id: str
    created: int
    owned_by: str
    root: str
    """The base model."""
    object: str = "model"


class ServedModelList(msgspec.Struct, frozen=True):
    data: list[ServedModel]
    object: str = "list"


async def list_served(plane: ControlPlane, request: Request) -> Response:
    account = account_of(request)
    rows = await plane.deployments.list(account)
    served = [
        ServedModel(
            id=deployment_name(account, row.id),
            created=int(row.created_at),
            owned_by=account,
            root=row.config.base_model.name,
        )
        for row in rows
        if row.state in DEPLOYMENT_LIVE
    ]
    return json_response(ServedModelList(served))


ENDPOINTS = [
    Endpoint("GET", "/inference/v1/models", list_served, "Deployments as models", ServedModelList),
]
