"""The lineage of an account's weights."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from homefire.control.endpoints import Endpoint
from homefire.control.lineage_graph import dot
from homefire.control.plane import ControlPlane
from homefire.control.routes.accounts import own_account
from homefire.http.bodies import json_response
from homefire.wire.errors import InvalidArgument
from homefire.wire.records import Lineage, LineageQuestion

_QUERY = ("weights", "job", "step", "model", "node", "direction", "format")


async def get_lineage(plane: ControlPlane, request: Request) -> Response:
    query = request.query_params
    form = query.get("format", "json")
    if form not in ("json", "dot"):
        raise InvalidArgument(f"format {form!r} is unknown", hint="use json or dot", field="format")
    found = await plane.records.account_lineage(own_account(request), _question(query))
    if form == "dot":
        return PlainTextResponse(dot(found), media_type="text/vnd.graphviz")
    return json_response(found)


def _question(query: Mapping[str, str]) -> LineageQuestion:
    given = {k: v for k, v in query.items() if k in _QUERY and k != "format" and v}
    if "job" in given:
        given["job"] = given["job"].rpartition("/")[2]
    try:
        return msgspec.convert(given, LineageQuestion, strict=False)
    except msgspec.ValidationError as exc:
        field = str(exc).rpartition("`$.")[2].rstrip("`")
        raise InvalidArgument(f"the query is invalid: {exc}", field=field) from exc


ENDPOINTS = [
    Endpoint(
        "GET",
        "/v1/accounts/{account}/lineage",
        get_lineage,
        "One graph of models, jobs, steps, snapshots, hot loads and evaluations, or a part of it",
        Lineage,
        query=_QUERY,
    ),
]
