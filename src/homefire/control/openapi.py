"""The OpenAPI document, generated from the route table and the structs. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import msgspec

from homefire import __version__
from homefire.control.endpoints import Endpoint

_REFERENCE = "#/components/schemas/{name}"
_PARAMETER = re.compile(r"\{(\w+)(?::\w+)?\}")
"""Of a path as Starlette writes it: `{job}`, or `{model:path}` with slashes."""


def openapi_document(endpoints: Sequence[Endpoint]) -> dict[str, Any]:
    types = [kind for e in endpoints for kind in (e.body, e.answer) if kind is not None]
    schemas, components = msgspec.json.schema_components(types, ref_template=_REFERENCE)
    by_type = {id(kind): schema for kind, schema in zip(types, schemas, strict=True)}
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in endpoints:
        operation = _operation(endpoint, by_type)
        path = _PARAMETER.sub(r"{\1}", endpoint.path)
        paths.setdefault(path, {})[endpoint.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "homefire control plane", "version": __version__},
        "paths": paths,
        "components": {"schemas": components, "securitySchemes": _SECURITY},
        "security": [{"apiKey": []}, {"bearer": []}],
    }


_SECURITY = {
    "apiKey": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    "bearer": {"type": "http", "scheme": "bearer"},
}


def _operation(endpoint: Endpoint, schemas: dict[int, Any]) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "summary": endpoint.summary,
        "parameters": _parameters(endpoint),
        "responses": {"200": {"description": "OK"}, "4XX": {"description": "the request's fault"}},
    }
    if endpoint.answer is not None:
        operation["responses"]["200"]["content"] = _json(schemas[id(endpoint.answer)])
    if endpoint.body is not None:
        operation["requestBody"] = {"content": _json(schemas[id(endpoint.body)])}
    return operation


def _parameters(endpoint: Endpoint) -> list[dict[str, Any]]:
    path = [(name, "path") for name in _PARAMETER.findall(endpoint.path)]
    query = [(name, "query") for name in endpoint.query]
    headers = [(name, "header") for name in endpoint.headers]
    return [
        {"name": name, "in": where, "required": where == "path", "schema": {"type": "string"}}
        for name, where in path + query + headers
    ]


def _json(schema: Any) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
