"""The training plane: forwarded byte for byte, and answered in a front's place while it is down."""

from __future__ import annotations

import asyncio

import pytest
from aiohttp import web

from homefire.gateway.routing import Holds
from homefire.wire.specs import Upstream

BASE = "/training/v1/rlorTrainerJobs/local/job-1/api/v1"
NOBODY = "nobody listens here"


def nowhere(stack) -> Upstream:
    return Upstream(str(stack.directory / "nowhere.sock"), NOBODY)


async def test_the_prefix_is_stripped_and_the_rest_arrives_as_sent(stack):
    await stack.trainer()
    client = await stack.start()
    answer = await client.post(
        f"{BASE}/forward_backward?x=%2F&y=a+b",
        content=b"\x00\xff not parsed",
        headers={"content-type": "application/x-protobuf"},
    )
    seen = answer.json()
    assert seen["path"] == "/api/v1/forward_backward?x=%2F&y=a+b"
    assert seen["body"].encode("latin-1") == b"\x00\xff not parsed"
    assert seen["headers"]["content-type"] == "application/x-protobuf"
    assert seen["headers"]["x-homefire-secret"] == "job-1-secret"


async def test_status_and_headers_of_the_front_come_back(stack):
    async def teapot(request: web.Request) -> web.Response:
        return web.Response(
            status=418, body=b"short", headers={"x-mark": "1", "connection": "close"}
        )

    await stack.trainer(answer=teapot)
    client = await stack.start()
    answer = await client.post(f"{BASE}/optim_step")
    assert (answer.status_code, answer.content, answer.headers["x-mark"]) == (418, b"short", "1")
    assert "connection" not in answer.headers


@pytest.mark.parametrize("down", ["refused", "no upstream", "starting"])
@pytest.mark.parametrize(
    ("operation", "status", "expected"),
    [
        ("session_heartbeat", 200, {"type": "session_heartbeat"}),
        ("telemetry", 200, {"status": "accepted"}),
        (
            "retrieve_future",
            408,
            {"type": "try_again", "request_id": "job-1.8d", "queue_state": "paused_capacity"},
        ),
    ],
)
async def test_a_front_that_is_down_is_stood_in_for(stack, down, operation, status, expected):
    state = "JOB_STATE_CREATING" if down == "starting" else "JOB_STATE_RUNNING"
    stack.route_trainer(
        "job-1", nowhere(stack) if down == "refused" else None, state, "engine died"
    )
    client = await stack.start()
    answer = await client.post(f"{BASE}/{operation}", json={"request_id": "job-1.8d"})
    assert answer.status_code == status
    assert answer.json().items() >= expected.items()
    if operation == "retrieve_future":
        assert "engine died" in answer.json()["queue_state_reason"]


@pytest.mark.parametrize("body", [b"", b"not json", b'{"request_id": 7}'])
async def test_a_future_body_that_names_no_request_still_gets_its_408(stack, body):
    stack.route_trainer("job-1", None)
    client = await stack.start()
    answer = await client.post(f"{BASE}/retrieve_future", content=body)
    assert (answer.status_code, answer.json()["request_id"]) == (408, "")


@pytest.mark.parametrize("operation", ["healthz", "forward", "create_session"])
async def test_other_calls_get_a_503_that_says_when_to_retry(stack, operation):
    stack.route_trainer("job-1", nowhere(stack))
    client = await stack.start()
    answer = await client.post(f"{BASE}/{operation}")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.json()["error"]["code"] == "unavailable"


async def test_a_job_that_does_not_exist_is_not_found(stack):
    client = await stack.start()
    answer = await client.post(f"{BASE}/retrieve_future", json={"request_id": "x"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


@pytest.mark.parametrize("state", ["JOB_STATE_FAILED", "JOB_STATE_CANCELLED", "JOB_STATE_DELETED"])
async def test_an_ended_job_fails_its_futures_and_refuses_the_rest(stack, state):
    stack.use_holds(Holds(request_s=60, future_s=60, look_again_s=60))
    stack.route_trainer("job-1", None, state, "out of disk")
    client = await stack.start()
    future = await client.post(f"{BASE}/retrieve_future", json={"request_id": "x"})
    assert future.status_code == 200
    assert future.json()["category"] == "server"
    assert state in future.json()["error"]
    assert "out of disk" in future.json()["error"]
    other = await client.post(f"{BASE}/forward")
    assert (other.status_code, other.json()["error"]["code"]) == (400, "failed_precondition")
    assert "resume" in other.json()["error"]["hint"]
    assert (await client.get(f"{BASE}/healthz")).status_code == 503


@pytest.mark.parametrize("operation", ["forward", "retrieve_future"])
async def test_a_held_call_goes_on_when_the_front_comes_back(stack, operation):
    stack.use_holds(Holds(request_s=60, future_s=60, look_again_s=60))
    stack.route_trainer("job-1", None)
    client = await stack.start()
    waiting = asyncio.create_task(client.post(f"{BASE}/{operation}", json={"request_id": "r"}))
    while "GET /internal/routes" not in stack.control.service.requests:
        await asyncio.sleep(0)
    assert not waiting.done()
    await stack.trainer()
    answer = await waiting
    assert answer.json()["path"] == f"/api/v1/{operation}"
    assert answer.json()["body"] == '{"request_id":"r"}'


async def test_a_job_newer_than_the_table_is_asked_for_before_it_is_refused(stack):
    client = await stack.start()
    await client.get("/v1/accounts")
    trainer = await stack.service("job-2")
    stack.control._changed = asyncio.Event()  # the long poll sleeps through this change
    stack.route_trainer("job-2", trainer.upstream)
    answer = await client.post("/training/v1/rlorTrainerJobs/local/job-2/api/v1/create_session")
    assert answer.status_code == 200


async def test_the_table_is_kept_when_control_dies(stack):
    trainer, replica = await stack.trainer(), await stack.replica()
    client = await stack.start()
    await client.get("/v1/accounts")
    await stack.control.service.stop()
    assert (await client.post(f"{BASE}/forward")).status_code == 200
    completion = await client.post("/inference/v1/completions", json={"model": "dep"})
    assert completion.status_code == 200
    assert (len(trainer.requests), len(replica.requests)) == (1, 1)
    refused = await client.get("/v1/accounts")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
    unknown = await client.post("/inference/v1/completions", json={"model": "other"})
    assert unknown.json()["error"]["code"] == "unknown_deployment"


async def test_a_call_to_control_waits_for_its_return(stack):
    stack.use_holds(Holds(request_s=60, future_s=60, look_again_s=0.01))
    client = await stack.start()
    await client.get("/v1/accounts")
    await stack.control.service.stop()
    waiting = asyncio.create_task(client.get("/v1/accounts"))
    await asyncio.sleep(0)
    await stack.control.service.start()
    assert (await waiting).status_code == 200
    stack.route_trainer("job-9", None)
    while stack.control.service.requests[-1].startswith("GET /v1"):
        await asyncio.sleep(0)


async def test_a_read_that_a_dying_control_dropped_is_asked_again(stack):
    drops = [True]

    async def drop_once(request: web.Request) -> web.StreamResponse:
        if drops:
            drops.pop()
            assert request.transport is not None
            request.transport.abort()
        return web.json_response({"method": request.method})

    stack.use_holds(Holds(request_s=60, look_again_s=0.01))
    await stack.trainer(answer=drop_once)
    client = await stack.start()
    assert (await client.get(f"{BASE}/get_server_capabilities")).status_code == 200
    drops.append(True)
    assert (await client.post(f"{BASE}/forward")).status_code == 503


async def test_a_gateway_that_starts_while_control_is_down_uses_the_saved_table(stack):
    await stack.trainer()
    import msgspec

    routes = stack.directory / "run" / "routes.json"
    routes.write_bytes(msgspec.json.encode(stack.control.table))
    stack.use_holds(Holds(request_s=0, future_s=0))
    client = await stack.start()
    await stack.control.service.stop()
    assert (await client.post(f"{BASE}/forward")).status_code == 200


async def test_a_damaged_saved_table_is_not_trusted(stack):
    (stack.directory / "run" / "routes.json").write_bytes(b'{"version": "torn')
    stack.use_holds(Holds(request_s=0, future_s=0))
    client = await stack.start()
    assert (await client.get("/v1/accounts")).status_code == 200


async def test_a_front_that_breaks_off_before_answering_is_a_503(stack):
    async def hang_up(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    await stack.trainer(answer=hang_up)
    client = await stack.start()
    answer = await client.post(f"{BASE}/forward_backward", content=b"x")
    assert answer.status_code == 503
    future = await client.post(f"{BASE}/retrieve_future", json={"request_id": "r"})
    assert future.status_code == 408


async def paused(stack, woken: list[str], trainer) -> None:
    async def wake(request: web.Request) -> web.Response:
        woken.append((await request.json())["service"])
        stack.route_trainer("job-1", trainer.upstream)
        return web.json_response({})

    stack.control.answer_root = wake
    stack.route_trainer("job-1", None, "JOB_STATE_PAUSED", "paused; `homefire trainer resume`")


@pytest.mark.parametrize("operation", ["forward_backward", "create_session", "save_weights"])
async def test_an_operation_wakes_a_paused_trainer_and_goes_on(stack, operation):
    stack.use_holds(Holds(request_s=60, future_s=60, look_again_s=60))
    woken: list[str] = []
    await paused(stack, woken, await stack.service("job-1"))
    client = await stack.start()
    assert (await client.post(f"{BASE}/{operation}", json={})).status_code == 200
    assert woken == ["job-1"]


@pytest.mark.parametrize(
    ("operation", "status"),
    [("session_heartbeat", 200), ("retrieve_future", 408), ("sessions/s/finish", 503)],
)
async def test_who_waits_or_merely_lives_leaves_a_paused_trainer_alone(stack, operation, status):
    woken: list[str] = []
    await paused(stack, woken, await stack.service("job-1"))
    client = await stack.start()
    answer = await client.post(f"{BASE}/{operation}", json={"request_id": "r"})
    assert (answer.status_code, woken) == (status, [])
    if operation == "retrieve_future":
        assert "homefire trainer resume" in answer.json()["queue_state_reason"]
