"""What every request must pass: key, host, path; and the request id that it gets back."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from starlette.routing import Route

from homefire.foundation.clock import SystemClock
from homefire.gateway.app import gateway_routes
from homefire.gateway.control_calls import ControlCalls
from homefire.gateway.hosts import HostList, host_name
from homefire.gateway.keys import account_of_key, given_key
from homefire.gateway.proxy import Proxy
from homefire.gateway.route_feed import RouteFeed
from homefire.gateway.routing import Holds, Router
from homefire.gateway.upstreams import Upstreams
from homefire.wire.errors import PermissionDenied
from homefire.wire.specs import Upstream

from .conftest import KEY, KEYS, OTHER_KEY, PLAIN_KEY

OPEN_PATHS = {"/healthz"}
SIGNED = "/api/v1/downloads/"
"""Reads below it carry a signature that control checks, and no key."""
TRAINER = "/training/v1/rlorTrainerJobs/local/job-1/api/v1"


def every_route() -> list[str]:
    upstreams = Upstreams()
    feed = RouteFeed(Upstream("", ""), upstreams)
    clock, holds = SystemClock(), Holds()
    router = Router(feed, Proxy(upstreams), clock, holds)
    routes = gateway_routes(router, upstreams, ControlCalls(feed, clock, holds), nonce="")
    paths = [route.path for route in routes if isinstance(route, Route)]
    assert len(paths) == len(routes)
    fill = {
        "{account}": "local",
        "{job}": "job-1",
        "{operation:path}": "forward",
        "{path:path}": "x",
    }
    for pattern, value in fill.items():
        paths = [path.replace(pattern, value) for path in paths]
    return paths


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"x-api-key": ""},
        {"x-api-key": "tml-wrong"},
        {"authorization": "Bearer tml-wrong"},
        {"authorization": f"Basic {KEY}"},
        {"x-homefire-secret": "control-secret", "x-homefire-account": "local"},
    ],
    ids=["none", "empty", "wrong", "wrong bearer", "another scheme", "forged service headers"],
)
async def test_no_route_answers_without_a_right_key(stack, headers):
    trainer, replica = await stack.trainer(), await stack.replica()
    client = await stack.start(key=None)
    for path in set(every_route()) - OPEN_PATHS:
        for method in ("GET", "POST", "DELETE"):
            if path.startswith(SIGNED) and method == "GET":
                continue
            answer = await client.request(method, path, headers=headers)
            assert answer.status_code == 401, f"{method} {path}"
            error = answer.json()["error"]
            assert error["code"] == "unauthenticated"
            assert error["request_id"] == answer.headers["x-request-id"]
    assert trainer.requests == replica.requests == []
    assert not [seen for seen in stack.control.service.requests if "/internal/routes" not in seen]


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_a_signed_link_reaches_control_for_no_account(stack, method):
    """Whatever key or account the client claims: the signature is all that counts."""
    client = await stack.start(key=None)
    headers = {"x-api-key": OTHER_KEY, "x-homefire-account": "local", "range": "bytes=0-1"}
    answer = await client.request(method, f"{SIGNED}token/file", headers=headers)
    assert answer.status_code == 200
    if method == "GET":
        seen = answer.json()
        assert seen["path"] == f"{SIGNED}token/file"
        assert seen["headers"]["x-homefire-account"] == ""
        assert seen["headers"]["range"] == "bytes=0-1"
        assert "x-api-key" not in seen["headers"]
    assert f"{SIGNED}token/file" in " ".join(stack.control.service.requests)


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
async def test_below_the_signed_prefix_nothing_is_written_without_a_key(stack, method):
    client = await stack.start(key=None)
    assert (await client.request(method, f"{SIGNED}token/file")).status_code == 401


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/api/v1/downloads", 401),
        ("/api/v1/downloadsx/token/file", 401),
        ("/api/v1/Downloads/token/file", 401),
        ("//api/v1/downloads/token/file", 401),
        ("/x/api/v1/downloads/token/file", 401),
        ("/api/v1/downloads/%2e%2e/checkpoints", 400),
        ("/api/v1/downloads/..%2fcheckpoints", 400),
        ("/api/v1/downloads/x/%2e%2e/%2e%2e/%2e%2e/%2e%2e/v1/accounts", 400),
        ("/api/v1/downloads/%2e/checkpoints", 400),
    ],
)
async def test_the_signed_prefix_opens_no_other_path(stack, path, status):
    client = await stack.start(key=None)
    answer = await client.get(path)
    assert answer.status_code == status
    assert [seen for seen in stack.control.service.requests if "/internal/routes" not in seen] == []


async def test_a_path_that_is_no_route_needs_a_key_too(stack):
    client = await stack.start(key=None)
    assert (await client.get("/nowhere")).status_code == 401
    assert (await client.get("/nowhere", headers={"x-api-key": KEY})).status_code == 404


@pytest.mark.parametrize(
    "headers",
    [
        {"x-api-key": KEY},
        {"authorization": f"Bearer {KEY}"},
        {"x-api-key": KEY, "authorization": "Bearer something-else"},
        {"x-api-key": PLAIN_KEY},
        {"x-api-key": f"tml-{PLAIN_KEY}"},
        {"x-api-key": f"fw_{KEY}"},
    ],
    ids=["x-api-key", "bearer", "x-api-key wins", "plain", "surplus tml-", "surplus fw_"],
)
async def test_a_right_key_is_taken_from_either_header_and_goes_no_further(stack, headers):
    client = await stack.start(key=None)
    answer = await client.get("/v1/accounts", headers=headers)
    seen = answer.json()["headers"]
    assert seen["x-homefire-account"] == "local"
    assert seen["x-homefire-secret"] == "control-secret"
    assert not {"x-api-key", "authorization"} & seen.keys()
    assert KEY not in answer.text


async def test_service_headers_of_a_client_are_replaced(stack):
    client = await stack.start(key=OTHER_KEY)
    answer = await client.get("/v1/accounts", headers={"x-homefire-account": "local"})
    assert answer.json()["headers"]["x-homefire-account"] == "other"


def test_a_key_without_prefix_is_not_found_by_adding_one():
    assert account_of_key(KEY.removeprefix("tml-"), KEYS) is None
    assert given_key(httpx.Headers({"authorization": f"bearer  {KEY} "})) == KEY


async def test_another_accounts_trainer_is_not_found(stack):
    trainer = await stack.trainer()
    client = await stack.start(key=OTHER_KEY)
    answer = await client.post(f"{TRAINER}/forward")
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "not_found"
    missing = await client.post("/training/v1/rlorTrainerJobs/other/job-1/api/v1/forward")
    assert missing.status_code == 404
    assert trainer.requests == []


async def test_another_accounts_deployment_is_as_unknown_as_one_that_never_was(stack):
    replica = await stack.replica()
    client = await stack.start(key=OTHER_KEY)
    for model in ("accounts/local/deployments/dep", "dep", "x#accounts/local/deployments/dep"):
        answer = await client.post("/inference/v1/completions", json={"model": model})
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "unknown_deployment"
        assert answer.json()["error"]["hint"] == "there are no deployments yet"
    assert replica.requests == []


async def test_the_callers_request_id_reaches_the_service_and_comes_back_once(stack):
    client = await stack.start()
    answer = await client.get("/v1/accounts", headers={"x-request-id": "f00d"})
    assert answer.json()["headers"]["x-request-id"] == "f00d"
    assert answer.headers.get_list("x-request-id") == ["f00d"]


async def test_a_request_id_that_is_no_id_is_replaced(stack):
    client = await stack.start()
    answer = await client.get("/v1/accounts", headers={"x-request-id": "a b<script>"})
    fresh = answer.headers["x-request-id"]
    assert len(fresh) == 32
    assert answer.json()["headers"]["x-request-id"] == fresh


@pytest.mark.parametrize("host", ["127.0.0.1:8700", "localhost", "[::1]:8700", "homefire.example"])
async def test_our_own_hosts_are_answered(stack, host):
    client = await stack.start()
    assert (await client.get("/v1/accounts", headers={"host": host})).status_code == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "", "localhost.evil"])
@pytest.mark.parametrize("path", ["/v1/accounts", "/healthz", "/internal/health"])
async def test_a_host_that_is_not_ours_is_refused(stack, host, path):
    client = await stack.start()
    answer = await client.get(path, headers={"host": host})
    assert answer.status_code == 403
    assert "--advertise-url" in answer.json()["error"]["hint"]


def test_host_names_are_compared_without_port_and_case():
    assert [host_name(text) for text in ("A.b:1", "[::1]:2", "::1", " c ")] == [
        "a.b",
        "::1",
        "::1",
        "c",
    ]
    with pytest.raises(PermissionDenied):
        HostList().check("homefire.example")


@pytest.mark.parametrize(
    "path", ["/v1/../internal/routes", "/v1/%2e%2e/internal/routes", "/v1/./x"]
)
async def test_a_dot_segment_never_reaches_a_service(stack, path):
    client = await stack.serve()
    assert (await client.get("/v1/accounts")).status == 200
    before = list(stack.control.service.requests)
    reader, writer = await asyncio.open_connection(stack.host, stack.port)
    lines = [f"GET {path} HTTP/1.1", "Host: localhost", f"X-API-Key: {KEY}", "Connection: close"]
    writer.write("\r\n".join([*lines, "", ""]).encode())
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    assert answer.startswith(b"HTTP/1.1 400")
    assert [seen for seen in stack.control.service.requests if "wait_s" not in seen] == [
        seen for seen in before if "wait_s" not in seen
    ]


async def test_health_needs_no_key_and_tells_nothing(stack):
    client = await stack.start(key=None)
    answer = await client.get("/healthz")
    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


async def test_internal_health_proves_the_process_to_who_knows_the_secret(stack):
    client = await stack.start(key=None)
    answer = await client.get("/internal/health", headers={"x-homefire-secret": "gateway-secret"})
    assert answer.json()["nonce"] == "gateway-nonce"
    with_key = await client.get("/internal/health", headers={"x-api-key": KEY})
    assert with_key.status_code == 401


async def test_serverless_training_is_refused_by_name_with_the_way_to_a_trainer(stack):
    client = await stack.start()
    answer = await client.post("/training/v1/serverless/sessions", json={})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["category"]) == (400, "unsupported", "user")
    assert "/api/v1" in error["hint"]


async def test_before_the_first_table_nobody_is_told_that_the_key_is_wrong(stack):
    stack.control.publish(keys=[])
    client = await stack.start()
    answer = await client.get("/v1/accounts")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
