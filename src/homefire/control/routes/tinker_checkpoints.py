"""`/api/v1`: checkpoints of the root Tinker plane's training runs."""

from __future__ import annotations

import re
from email.utils import formatdate

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from homefire.control.endpoints import Endpoint
from homefire.control.paging import Window
from homefire.control.plane import ControlPlane
from homefire.control.tinker.presentation import checkpoint, weights_description
from homefire.foundation.clock import rfc3339
from homefire.http.app import account_of
from homefire.http.bodies import json_response, read_json
from homefire.wire.checkpoint_paths import CheckpointPath, checkpoint_in, parse_checkpoint_path
from homefire.wire.errors import InvalidArgument
from homefire.wire.manifest import CheckpointFamily, Manifest
from homefire.wire.tinker import WeightsInfo
from homefire.wire.tinker_rest import (
    CheckpointList,
    CopyWeightsAnswer,
    CopyWeightsRequest,
    Cursor,
    FileUrls,
    TtlRequest,
    WeightsDescription,
)

_DEFAULT_LIMIT = 100
_RELEASE = re.compile(r"^(\d{1,6})\.(\d{1,6})")
_KNOWS_EXTERNAL_WEIGHTS = (0, 28)
_ALL = "/api/v1/training_runs/{run}/checkpoints"
_ONE = f"{_ALL}/{{kind}}/{{name}}"


async def list_of_account(plane: ControlPlane, request: Request) -> Response:
    window = Window.of(request.query_params, default=_DEFAULT_LIMIT)
    found = await plane.management.checkpoints.of_account(account_of(request))
    manifests = _known_to_client(request, found)
    cursor = Cursor(window.offset, window.limit, len(manifests))
    return json_response(CheckpointList([checkpoint(m) for m in window.cut(manifests)], cursor))


async def list_of_run(plane: ControlPlane, request: Request) -> Response:
    run = request.path_params["run"]
    found = await plane.management.checkpoints.of_run(account_of(request), run)
    manifests = _known_to_client(request, found)
    return json_response(CheckpointList([checkpoint(m) for m in manifests]))


async def delete(plane: ControlPlane, request: Request) -> Response:
    await plane.management.checkpoints.delete(account_of(request), _path(request))
    return json_response({})


async def delete_bare(plane: ControlPlane, request: Request) -> Response:
    """A name alone may mean a state and a snapshot: refused with what to write instead."""
    account_of(request)
    checkpoint_in(request.path_params["run"], request.path_params["checkpoint"])
    return json_response({})


async def publish(plane: ControlPlane, request: Request) -> Response:
    await plane.management.checkpoints.publish(account_of(request), _path(request), public=True)
    return json_response({})


async def unpublish(plane: ControlPlane, request: Request) -> Response:
    await plane.management.checkpoints.publish(account_of(request), _path(request), public=False)
    return json_response({})


async def set_ttl(plane: ControlPlane, request: Request) -> Response:
    account = account_of(request)
    ttl_seconds = (await read_json(request, TtlRequest)).ttl_seconds
    if ttl_seconds is msgspec.UNSET:
        raise InvalidArgument(
            "ttl_seconds is missing", hint="use a number of seconds, or null", field="ttl_seconds"
        )
    await plane.management.checkpoints.set_ttl(account, _path(request), ttl_seconds)
    return json_response({})


async def archive(plane: ControlPlane, request: Request) -> Response:
    """A redirect that clients up to 0.35 read and do not follow."""
    url, expires_at = await plane.management.checkpoints.archive_link(
        account_of(request), _path(request)
    )
    headers = {"location": url, "expires": formatdate(expires_at, usegmt=True)}
    return Response(status_code=302, headers=headers)


async def external_weights_urls(plane: ControlPlane, request: Request) -> Response:
    urls, expires_at = await plane.management.checkpoints.file_links(
        account_of(request), _path(request)
    )
    return json_response(FileUrls(urls, rfc3339(expires_at)))


async def weights_info(plane: ControlPlane, request: Request) -> Response:
    """Also of another account's published checkpoint."""
    account, asked = account_of(request), await read_json(request, WeightsInfo)
    path = parse_checkpoint_path(asked.tinker_path, field="tinker_path")
    base_model, manifest = await plane.management.checkpoints.described(account, path)
    return json_response(weights_description(manifest, base_model=base_model))


async def copy_weights(plane: ControlPlane, request: Request) -> Response:
    account, asked = account_of(request), await read_json(request, CopyWeightsRequest)
    key = request.headers.get("x-idempotency-key", "")
    path = await plane.management.copies.copy(account, asked, idempotency_key=key)
    return json_response(CopyWeightsAnswer(str(path)))


def _known_to_client(request: Request, manifests: list[Manifest]) -> list[Manifest]:
    """An older client refuses a whole list over one checkpoint of a type that it does not know."""
    match = _RELEASE.match(request.headers.get("x-stainless-package-version", ""))
    if match is None or (int(match[1]), int(match[2])) >= _KNOWS_EXTERNAL_WEIGHTS:
        return manifests
    return [m for m in manifests if m.family is not CheckpointFamily.EXTERNAL]


def _path(request: Request) -> CheckpointPath:
    parts = request.path_params
    return checkpoint_in(parts["run"], f"{parts['kind']}/{parts['name']}")


ENDPOINTS = [
    Endpoint(
        "GET",
        "/api/v1/checkpoints",
        list_of_account,
        "Checkpoints of all runs, newest first",
        CheckpointList,
        query=("limit", "offset"),
    ),
    Endpoint("GET", _ALL, list_of_run, "Checkpoints of one run, newest first", CheckpointList),
    Endpoint("DELETE", _ONE, delete, "Delete one that nothing rests on"),
    Endpoint("DELETE", f"{_ALL}/{{checkpoint}}", delete_bare, "A bare name: refused with 400"),
    Endpoint("POST", f"{_ONE}/publish", publish, "Mark as public"),
    Endpoint("DELETE", f"{_ONE}/publish", unpublish, "Mark as private again"),
    Endpoint("PUT", f"{_ONE}/ttl", set_ttl, "When it expires; null: never", body=TtlRequest),
    Endpoint("GET", f"{_ONE}/archive", archive, "302 to a signed link to a tar of its files"),
    Endpoint(
        "GET",
        f"{_ONE}/external_weights_urls",
        external_weights_urls,
        "A signed link to each file of external weights",
        FileUrls,
    ),
    Endpoint(
        "POST",
        "/api/v1/weights_info",
        weights_info,
        "Base model and LoRA settings of a checkpoint",
        WeightsDescription,
        WeightsInfo,
    ),
    Endpoint(
        "POST",
        "/api/v1/copy_weights",
        copy_weights,
        "Copy a checkpoint into a project, or into a model of a session",
        CopyWeightsAnswer,
        CopyWeightsRequest,
        headers=("x-idempotency-key",),
    ),
]
