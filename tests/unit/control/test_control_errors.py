"""Whatever comes in: a typed answer, never a 5xx, and nothing changed."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from homefire.control.app import ENDPOINTS
from homefire.control.names import check_id, id_in
from homefire.control.openapi import openapi_document
from homefire.control.paging import Page
from homefire.wire.errors import HomefireError
from homefire.wire.ids import NAME

ODD = [
    "'; DROP TABLE jobs; --",
    '" OR 1=1 --',
    "..",
    "%2e%2e",
    "a:cancel:resume",
    "é",
    "x" * 300,
    " ",
    "\x01",
    "-rf",
]
_PARAMETER = re.compile(r"\{(\w+)(?::\w+)?\}")
NAMING = [e for e in ENDPOINTS if set(_PARAMETER.findall(e.path)) - {"account"}]
"""Routes whose path names something beside the account."""


def filled(path: str, value: str) -> str:
    """The path with `value` for every parameter that does not choose among words of ours."""
    own = path.replace("{account}", "local").replace("{hosted:hosted}", "datasets")
    return _PARAMETER.sub(quote(value, safe=""), own)


# A client resolves ".." before it sends, so the raw one is tried where it is no path.
@pytest.mark.parametrize("value", [value for value in ODD if value != ".."])
async def test_odd_names_get_a_typed_error_on_every_route(control: Any, value: str) -> None:
    await control.create_job("survivor")
    for endpoint in NAMING:
        body = {} if endpoint.method in ("POST", "PATCH") else None
        path = filled(endpoint.path, value)
        response = await control.client.request(endpoint.method, path, json=body)
        assert 400 <= response.status_code < 500, (endpoint.path, response.text)
        error = response.json()["error"]
        assert all(error[key] for key in ("code", "category", "message", "request_id"))
        assert "hint" in error
        assert response.headers["x-request-id"] == error["request_id"]
    listed = await control.call("GET", "/v1/accounts/local/rlorTrainerJobs")
    assert "accounts/local/rlorTrainerJobs/survivor" in [
        job["name"] for job in listed["rlorTrainerJobs"]
    ]


@pytest.mark.parametrize("value", [v for v in ODD if not NAME.match(v) or ":" in v])
async def test_odd_names_cannot_be_given_to_new_resources(control: Any, value: str) -> None:
    for path, query in (
        ("rlorTrainerJobs", "rlorTrainerJobId"),
        ("deployments", "deploymentId"),
    ):
        body = {"baseModel": "tiny", "trainingConfig": {"baseModel": "tiny"}}
        refused = await control.call(
            "POST", f"/v1/accounts/local/{path}", body, params={query: value}, expect=400
        )
        assert refused["error"]["param"] == query


async def test_every_route_needs_the_secret_and_an_account(control: Any) -> None:
    for endpoint in ENDPOINTS:
        path = filled(endpoint.path, "x")
        bare = await control.client.request(
            endpoint.method, path, headers={"x-homefire-secret": "wrong"}
        )
        assert bare.status_code == 401, path
        if endpoint.path.startswith(("/internal/", "/v1/openapi", "/api/v1/downloads/")):
            continue  # the services' own; about nobody; signed by themselves
        nobody = await control.client.request(
            endpoint.method, path, headers={"x-homefire-account": ""}
        )
        assert nobody.status_code == 401, path


async def test_another_accounts_path_does_not_exist(control: Any) -> None:
    for endpoint in ENDPOINTS:
        readable = any(word in endpoint.path for word in ("trainingShapes", "models/{model}"))
        if "{account}" not in endpoint.path or (readable and endpoint.method == "GET"):
            continue
        path = filled(endpoint.path.replace("{account}", "other"), "x")
        response = await control.client.request(endpoint.method, path)
        assert response.status_code == 404, path


@pytest.mark.parametrize(
    "body", [b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b'{"trainingConfig": 3}', b"[" * 5000]
)
async def test_a_malformed_body_is_a_400(control: Any, body: bytes) -> None:
    for method, path in (
        ("POST", "/v1/accounts/local/rlorTrainerJobs"),
        ("POST", "/v1/accounts/local/deployments"),
        ("POST", "/v1/accounts/local/evaluations"),
        ("POST", "/hot_load/v1/models/hot_load"),
    ):
        response = await control.client.request(method, path, content=body)
        if body == b'{"trainingConfig": 3}' and "rlorTrainerJobs" not in path:
            continue
        assert response.status_code == 400, (path, response.text)
        assert response.json()["error"]["category"] == "user"


async def test_an_unknown_route_and_a_wrong_method_are_typed(control: Any) -> None:
    assert (await control.call("GET", "/v1/nope", expect=404))["error"]["code"] == "not_found"
    await control.call("PUT", "/v1/accounts", expect=405)


def test_the_openapi_document_describes_every_route() -> None:
    document = openapi_document(ENDPOINTS)
    described = {
        (method.upper(), path)
        for path, operations in document["paths"].items()
        for method in operations
    }
    assert described == {(e.method, _PARAMETER.sub(r"{\1}", e.path)) for e in ENDPOINTS}
    job = document["components"]["schemas"]["TrainerJob"]
    assert "trainingConfig" in job["properties"]


async def test_the_openapi_document_is_served(control: Any) -> None:
    assert (await control.call("GET", "/v1/openapi.json"))["openapi"] == "3.1.0"


@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.text(max_size=200))
def test_a_name_is_taken_whole_or_refused(text: str) -> None:
    for read in (
        lambda: check_id(text, field="f"),
        lambda: id_in(text, collection="models", account="local", field="f"),
    ):
        try:
            found = read()
        except HomefireError:
            continue
        assert NAME.match(found)
        assert text.endswith(found)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(), max_size=300), st.integers(1, 250))
def test_pages_put_together_are_the_list(items: list[int], size: int) -> None:
    token, gathered = "", list[int]()
    while True:
        page, token = Page.of({"pageSize": str(size), "pageToken": token}).cut(items)
        gathered += page
        if not token:
            break
    assert gathered == items
