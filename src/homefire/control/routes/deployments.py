"""Deployments and their ledgers."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from homefire.control.deployment_config import given_fields, mask_fields
from homefire.control.endpoints import LIST_QUERY, Endpoint
from homefire.control.listing import Listing
from homefire.control.plane import ControlPlane, DeploymentView
from homefire.control.presentation import deployment_resource
from homefire.control.routes.accounts import own_account
from homefire.http.bodies import decode_json, json_response, read_body, read_json
from homefire.wire.internal import LedgerEntry
from homefire.wire.resources import Deployment, DeploymentList, DeploymentRequest, ScaleRequest

_ALL = "/v1/accounts/{account}/deployments"
_ONE = f"{_ALL}/{{deployment}}"


class Ledger(msgspec.Struct, frozen=True):
    entries: list[LedgerEntry]
    """Oldest first."""


async def create(plane: ControlPlane, request: Request) -> Response:
    account = own_account(request)
    row = await plane.deployments.create(
        account,
        await read_json(request, DeploymentRequest),
        deployment_id=request.query_params.get("deploymentId"),
    )
    await plane.until_routed(account, row.id)
    return await _answer(plane, account, row.id)


async def list_deployments(plane: ControlPlane, request: Request) -> Response:
    account, asked = own_account(request), Listing.of(request.query_params)
    rows = await plane.deployments.list(account, tombstones=asked.shows_deleted)
    views = [await plane.deployment_view(account, row.id) for row in rows]
    found = asked.apply([_resource(plane, view) for view in views])
    return json_response(
        DeploymentList(
            deployments=found.items,
            next_page_token=found.next_page_token,
            total_size=found.total_size,
        )
    )


async def get(plane: ControlPlane, request: Request) -> Response:
    account, deployment = own_account(request), request.path_params["deployment"]
    return json_response(_resource(plane, await plane.held_deployment(account, deployment)))


async def patch(plane: ControlPlane, request: Request) -> Response:
    account, deployment = own_account(request), request.path_params["deployment"]
    body = await read_body(request) or b"{}"
    given = await decode_json(body, dict[str, Any])
    mask = request.query_params.get("updateMask")
    fields = mask_fields(mask) if mask else given_fields(given)
    asked = await decode_json(body, DeploymentRequest)
    await plane.deployments.patch(account, deployment, asked, fields=fields)
    return await _answer(plane, account, deployment)


async def scale(plane: ControlPlane, request: Request) -> Response:
    account, deployment = own_account(request), request.path_params["deployment"]
    asked = await read_json(request, ScaleRequest)
    await plane.deployments.scale(account, deployment, asked.replica_count)
    return await _answer(plane, account, deployment)


async def delete(plane: ControlPlane, request: Request) -> Response:
    await plane.deployments.delete(
        own_account(request),
        request.path_params["deployment"],
        hard=request.query_params.get("hard", "").lower() == "true",
    )
    return json_response({})


async def undelete(plane: ControlPlane, request: Request) -> Response:
    account, deployment = own_account(request), request.path_params["deployment"]
    await plane.deployments.undelete(account, deployment)
    return await _answer(plane, account, deployment)


async def get_ledger(plane: ControlPlane, request: Request) -> Response:
    row = await plane.deployments.get(own_account(request), request.path_params["deployment"])
    return json_response(Ledger(await plane.hot_loads.ledger(row)))


async def clear_ledger(plane: ControlPlane, request: Request) -> Response:
    account, deployment = own_account(request), request.path_params["deployment"]
    await plane.deployments.clear_ledger(account, deployment)
    return json_response({})


async def _answer(plane: ControlPlane, account: str, deployment: str) -> Response:
    return json_response(_resource(plane, await plane.deployment_view(account, deployment)))


def _resource(plane: ControlPlane, view: DeploymentView) -> Deployment:
    return deployment_resource(
        view.row, view.replicas, num_ready=view.num_ready, store=plane.home.store_root
    )


ENDPOINTS = [
    Endpoint(
        "POST",
        _ALL,
        create,
        "Create a deployment; it is waited for separately",
        Deployment,
        DeploymentRequest,
        query=(
            "deploymentId",
            "skipShapeValidation",
            "acceptShapelessRisk",
            "disableSpeculativeDecoding",
        ),
    ),
    Endpoint(
        "GET",
        _ALL,
        list_deployments,
        "Deployments, oldest first; tombstones with `showDeleted`",
        DeploymentList,
        query=LIST_QUERY,
    ),
    Endpoint(
        "PATCH",
        f"{_ONE}:scale",
        scale,
        "Set the number of replicas",
        Deployment,
        ScaleRequest,
    ),
    Endpoint("POST", f"{_ONE}:undelete", undelete, "Bring a tombstone back", Deployment),
    Endpoint("GET", _ONE, get, "One deployment; held while it is in transition", Deployment),
    Endpoint(
        "PATCH",
        _ONE,
        patch,
        "Change the fields of the mask, or without one the fields given",
        Deployment,
        DeploymentRequest,
        query=("updateMask",),
    ),
    Endpoint(
        "DELETE", _ONE, delete, "Stop its replicas and delete it", query=("ignoreChecks", "hard")
    ),
    Endpoint("GET", f"{_ONE}/ledger", get_ledger, "Its hot loads, oldest first", Ledger),
    Endpoint("DELETE", f"{_ONE}/ledger", clear_ledger, "Show no hot loads from before now"),
]
