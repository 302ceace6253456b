"""Training shapes. Readable under any account's name, since hosted names stand for models here."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from homefire.control.endpoints import Endpoint
from homefire.control.plane import ControlPlane
from homefire.http.app import account_of
from homefire.http.bodies import json_response
from homefire.wire.resources import (
    TrainingShapeList,
    TrainingShapeVersion,
    TrainingShapeVersionList,
)

_ONE = "/v1/accounts/{account}/trainingShapes/{shape}"


async def list_shapes(plane: ControlPlane, request: Request) -> Response:
    account_of(request)
    versions = await plane.models.shapes()
    return json_response(
        TrainingShapeList(training_shapes=[_unversioned(version) for version in versions])
    )


async def get_shape(plane: ControlPlane, request: Request) -> Response:
    return json_response(_unversioned(await plane.models.shape(_name(request))))


async def list_versions(plane: ControlPlane, request: Request) -> Response:
    return json_response(
        TrainingShapeVersionList(training_shape_versions=[await plane.models.shape(_name(request))])
    )


async def get_version(plane: ControlPlane, request: Request) -> Response:
    version = request.path_params["version"]
    return json_response(await plane.models.shape(f"{_name(request)}/versions/{version}"))


def _name(request: Request) -> str:
    account_of(request)
    parts = request.path_params
    return f"accounts/{parts['account']}/trainingShapes/{parts['shape']}"


def _unversioned(version: TrainingShapeVersion) -> TrainingShapeVersion:
    return msgspec.structs.replace(version, name=version.name.partition("/versions/")[0])


ENDPOINTS = [
    Endpoint(
        "GET",
        "/v1/accounts/{account}/trainingShapes",
        list_shapes,
        "What this machine can train",
        TrainingShapeList,
    ),
    Endpoint("GET", _ONE, get_shape, "One shape, as its latest version", TrainingShapeVersion),
    Endpoint(
        "GET",
        f"{_ONE}/versions",
        list_versions,
        "The shape's versions: one, which is valid",
        TrainingShapeVersionList,
        query=("filter", "pageSize"),
    ),
    Endpoint(
        "GET", f"{_ONE}/versions/{{version}}", get_version, "One version", TrainingShapeVersion
    ),
]
