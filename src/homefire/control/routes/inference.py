"""The part of the inference plane that needs no replica: what could be asked."""

from __future__ import annotations

import msgspec
from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from homefire.control.db.rows import DeploymentRow
from homefire.control.endpoints import Endpoint
from homefire.control.lifecycle import DEPLOYMENT_LIVE
from homefire.control.plane import ControlPlane, DeploymentView
from homefire.http.app import account_of
from homefire.http.bodies import json_response
from homefire.wire.completions import HomefireInfo, WeightsInfo
from homefire.wire.errors import ModelNotFound
from homefire.wire.ids import BASE_IDENTITY, deployment_name


class ServedModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model as the OpenAI protocol lists it; `id` is what a request names."""

    id: str
    object: str = "model"
    created: int
    owned_by: str
    root: str
    """The base model."""
    parent: str | None = None
    """Of a base model: the deployment that answers for it."""
    max_model_len: int
    """Tokens of prompt and completion together."""
    homefire: HomefireInfo | UnsetType = UNSET
    """The weights that its replicas serve; absent while there are none, or they differ."""


class ServedModelList(msgspec.Struct, frozen=True):
    data: list[ServedModel]
    object: str = "list"


async def list_served(plane: ControlPlane, request: Request) -> Response:
    return json_response(ServedModelList(await _served_models(plane, account_of(request))))


async def get_served(plane: ControlPlane, request: Request) -> Response:
    account, model = account_of(request), request.path_params["model"]
    served = {entry.id: entry for entry in await _served_models(plane, account)}
    entry = served.get(model) or served.get(deployment_name(account, model))
    if entry is None:
        raise ModelNotFound(
            f"model {model!r} is not served",
            hint=f"served: {', '.join(sorted(served))}" if served else "create a deployment",
            field="model",
        )
    return json_response(entry)


async def _served_models(plane: ControlPlane, account: str) -> list[ServedModel]:
    """The account's deployments, and the base models that one of them answers for."""
    answering = plane.routes.get().models
    models: list[ServedModel] = []
    for row in await plane.deployments.list(account):
        if row.state in DEPLOYMENT_LIVE:
            deployment = _served(await plane.deployment_view(account, row.id))
            models.append(deployment)
            base = row.config.base_model.name
            if answering.get(f"{account}/{base}") == f"{account}/{row.id}":
                models.append(msgspec.structs.replace(deployment, id=base, parent=deployment.id))
    return models


def _served(view: DeploymentView) -> ServedModel:
    row: DeploymentRow = view.row
    return ServedModel(
        id=deployment_name(row.account, row.id),
        created=int(row.created_at),
        owned_by=row.account,
        root=row.config.base_model.name,
        max_model_len=row.config.max_context_length,
        homefire=_weights(view),
    )


def _weights(view: DeploymentView) -> HomefireInfo | UnsetType:
    served = {
        WeightsInfo(seen.status.identity or BASE_IDENTITY, seen.status.digest)
        for seen in view.seen.values()
        if seen.status is not None and seen.status.ready
    }
    return HomefireInfo(served.pop()) if len(served) == 1 else UNSET


ENDPOINTS = [
    Endpoint("GET", f"{prefix}/models{path}", handler, summary, answer)
    for prefix in ("/inference/v1", "/v1")
    for path, handler, summary, answer in (
        ("", list_served, "Deployments, and the base models they answer for", ServedModelList),
        ("/{model:path}", get_served, "One of them", ServedModel),
    )
]
