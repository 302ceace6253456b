"""Models, promotion and its operations."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from homefire.control.db import tables
from homefire.control.db.rows import OperationRow
from homefire.control.endpoints import LIST_QUERY, Endpoint
from homefire.control.listing import Listing
from homefire.control.plane import ControlPlane
from homefire.control.presentation import operation_resource
from homefire.control.promotions import operation_error
from homefire.control.routes.accounts import own_account
from homefire.http.app import account_of
from homefire.http.bodies import json_response, read_json
from homefire.wire.errors import NotFound, Unavailable
from homefire.wire.ids import model_name
from homefire.wire.resources import (
    Model,
    ModelList,
    Operation,
    PromoteAnswer,
    PromoteRequest,
)

_ALL = "/v1/accounts/{account}/models"
_ONE = f"{_ALL}/{{model}}"


async def list_models(plane: ControlPlane, request: Request) -> Response:
    own_account(request)
    found = Listing.of(request.query_params).apply(await plane.models.list())
    return json_response(
        ModelList(
            models=found.items,
            next_page_token=found.next_page_token,
            total_size=found.total_size,
        )
    )


async def get(plane: ControlPlane, request: Request) -> Response:
    """Under any account's name: aliases stand for hosted models."""
    account_of(request)
    parts = request.path_params
    return json_response(await plane.models.get(model_name(parts["account"], parts["model"])))


async def delete(plane: ControlPlane, request: Request) -> Response:
    await plane.models.delete(own_account(request), request.path_params["model"])
    return json_response({})


async def promote(plane: ControlPlane, request: Request) -> Response:
    """Answers when the model is there; one that asked for the operation is held only so long."""
    account, checkpoint = own_account(request), request.path_params["checkpoint"]
    asked = await read_json(request, PromoteRequest)
    operation = await plane.promotions.begin(account, checkpoint, asked)
    if asked.async_promotion:
        operation = await plane.promotions.wait(operation, within_s=plane.config.hold_s)
        return json_response(PromoteAnswer(operation=await _operation(plane, operation)))
    operation = await plane.promotions.wait(operation)
    if (error := operation_error(operation)) is not None:
        raise error
    if not operation.done:
        raise Unavailable("control is stopping", hint="promote again when it is up")
    return json_response(PromoteAnswer(model=await _model(plane, operation)))


async def get_operation(plane: ControlPlane, request: Request) -> Response:
    account, operation_id = own_account(request), request.path_params["operation"]
    name = f"accounts/{account}/operations/{operation_id}"
    operation = await plane.promotions.operation(account, name)
    if operation is None:
        raise NotFound(f"operation {name} does not exist")
    operation = await plane.promotions.wait(operation, within_s=plane.config.hold_s)
    return json_response(await _operation(plane, operation))


async def _operation(plane: ControlPlane, operation: OperationRow) -> Operation:
    progress = None
    if not operation.done:
        row = await plane.database.transact(
            lambda c: tables.model(c, operation.account, operation.model)
        )
        progress = None if row is None else await plane.promotions.progress(row)
    return operation_resource(operation, await _model(plane, operation), progress=progress)


async def _model(plane: ControlPlane, operation: OperationRow) -> Model | None:
    row = await plane.database.transact(
        lambda c: tables.model(c, operation.account, operation.model)
    )
    return None if row is None else await plane.models.promoted(row)


ENDPOINTS = [
    Endpoint(
        "GET",
        _ALL,
        list_models,
        "Base models, aliases and promoted models",
        ModelList,
        query=LIST_QUERY,
    ),
    Endpoint("GET", _ONE, get, "One model", Model),
    Endpoint("DELETE", _ONE, delete, "Delete a promoted model and its files"),
    Endpoint(
        "POST",
        "/v1/accounts/{account}/checkpoints/{checkpoint}:promote",
        promote,
        "Make a model of a sampler snapshot",
        PromoteAnswer,
        PromoteRequest,
    ),
    Endpoint(
        "GET",
        "/v1/accounts/{account}/operations/{operation}",
        get_operation,
        "How a promotion goes; held while it runs",
        Operation,
    ),
]
