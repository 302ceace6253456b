"""The root plane: ids say who answers, and clients are kept waiting, never lost, while it starts."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import msgspec
import pytest
from aiohttp import web

from homefire.foundation.clock import ManualClock
from homefire.gateway.control_calls import ControlCalls
from homefire.gateway.promises import Creation, creation_promise
from homefire.gateway.route_feed import RouteFeed
from homefire.gateway.routing import Holds
from homefire.gateway.upstreams import Upstreams
from homefire.wire.internal import NewRun, RunPlace, Wake
from homefire.wire.pooled import SamplingSession

from .conftest import echo

RUN = "ts-00000000000000aa:train:0"
POOL = "pool-0123456789ab"
SAMPLER = f"{POOL}-sampler"
SESSION = "ts-00000000000000aa"
SAMPLING = SamplingSession.of(SAMPLER, SESSION, 0).id
CREATE = {
    "session_id": SESSION,
    "model_seq_id": 0,
    "base_model": "tiny",
    "lora_config": {"rank": 8},
}


class ScriptedControl:
    """Control's part of the root plane, which remembers what it was asked."""

    def __init__(self, stack: Any) -> None:
        self.placed: list[NewRun] = []
        self.found: list[str] = []
        self.woken: list[str] = []
        self.on_wake: Any = None
        self.refusal: tuple[int, dict[str, Any]] | None = None
        stack.control.answer_root = self.answer

    async def answer(self, request: web.Request) -> web.StreamResponse:
        if self.refusal is not None:
            status, body = self.refusal
            return web.json_response(body, status=status)
        if request.path == "/internal/tinker/runs":
            self.placed.append(msgspec.json.decode(await request.read(), type=NewRun))
            return web.Response(body=msgspec.json.encode(RunPlace(RUN, POOL)))
        if request.path == "/internal/tinker/wake":
            self.woken.append(msgspec.json.decode(await request.read(), type=Wake).service)
            if self.on_wake is not None:
                self.on_wake()
            return web.json_response({})
        self.found.append(f"{request.match_info['path']}?{request.query_string}")
        run = request.path.rpartition("/")[2]
        return web.Response(body=msgspec.json.encode(RunPlace(run, POOL)))


@pytest.fixture
def scripted(stack) -> ScriptedControl:
    return ScriptedControl(stack)


async def futures(request: web.Request) -> web.StreamResponse:
    """A front: it promises what it is given, and answers polls with what they asked for."""
    body = await request.json()
    if request.path == "/api/v1/retrieve_future":
        return web.json_response({"polled": body, "path": request.path})
    return web.json_response({"request_id": f"{POOL}.00000000000000ff", "model_id": RUN})


@pytest.mark.parametrize(
    ("path", "answer"),
    [
        ("client/config", {}),
        ("client/dynamic_config", {"sample_cancel_enabled": True}),
        ("telemetry", {"status": "accepted"}),
        ("healthz", {"status": "ok"}),
    ],
)
async def test_the_gateway_answers_for_itself(stack, path, answer):
    client = await stack.start()
    await client.get("/v1/accounts")
    await stack.control.service.stop()
    response = await client.post(f"/api/v1/{path}", json={"sdk_version": "0.38.0"})
    assert (response.status_code, response.json()) == (200, answer)


@pytest.mark.parametrize(
    "path",
    [
        "create_session",
        "create_sampling_session",
        "weights_info",
        "training_runs?limit=20&offset=0",
        f"samplers/{SAMPLING}",
        f"training_runs/{RUN}/checkpoints/weights/x",
    ],
)
async def test_everything_about_resources_goes_to_control_as_it_came(stack, path):
    client = await stack.start()
    answer = await client.request("PUT", f"/api/v1/{path}", content=b"as sent")
    assert answer.json()["path"] == f"/api/v1/{path}"
    assert answer.json()["body"] == "as sent"
    assert answer.json()["headers"]["x-homefire-account"] == "local"


async def test_heartbeats_are_answered_while_control_is_down(stack):
    client = await stack.start()
    beat = {"session_id": SESSION}
    answer = await client.post("/api/v1/session_heartbeat", json=beat)
    assert answer.json()["path"] == "/api/v1/session_heartbeat"
    await stack.control.service.stop()
    answer = await client.post("/api/v1/session_heartbeat", json=beat)
    assert (answer.status_code, answer.json()) == (200, {"type": "session_heartbeat"})


@pytest.mark.parametrize("path", ["create_custom_loss", "retrieve_futures", "auth/token"])
async def test_what_is_not_supported_is_refused_by_name(stack, path):
    client = await stack.start()
    answer = await client.post(f"/api/v1/{path}", json={})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unsupported")
    assert path in answer.json()["error"]["message"]


async def test_a_model_is_created_where_control_places_it(stack, scripted):
    await stack.trainer(POOL)
    client = await stack.start()
    metadata = {"renderer": "r", "depth": 2}
    answer = await client.post("/api/v1/create_model", json={**CREATE, "user_metadata": metadata})
    assert answer.json()["path"] == "/api/v1/create_model"
    assert '"base_model":"tiny"' in answer.json()["body"]
    (placed,) = scripted.placed
    assert (placed.account, placed.session_id, placed.model_seq_id) == ("local", SESSION, 0)
    assert (placed.base_model, placed.rank, placed.path) == ("tiny", 8, None)
    assert placed.user_metadata == {"renderer": "r", "depth": "2"}


async def test_a_load_that_creates_is_placed_and_one_that_loads_is_not(stack, scripted):
    await stack.trainer(POOL)
    client = await stack.start()
    path = "tinker://x/weights/y"
    creating = {"session_id": SESSION, "model_seq_id": 0, "path": path, "optimizer": True}
    assert (await client.post("/api/v1/load_weights", json=creating)).status_code == 200
    (placed,) = scripted.placed
    assert (placed.path, placed.rank, placed.base_model) == (path, None, None)
    loading = {"model_id": RUN, "seq_id": 1, "path": path}
    assert (await client.post("/api/v1/load_weights", json=loading)).status_code == 200
    assert len(scripted.placed) == 1


async def test_what_control_refuses_reaches_the_client_as_control_said_it(stack, scripted):
    client = await stack.start()
    error = {"code": "unknown_model", "message": "no such base; available: tiny", "hint": "h"}
    scripted.refusal = 400, {"error": error}
    answer = await client.post("/api/v1/create_model", json=CREATE)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unknown_model")
    assert "available: tiny" in answer.json()["detail"]


async def test_a_run_is_asked_for_once_and_known_ones_go_on_without_control(stack, scripted):
    trainer = await stack.trainer(POOL)
    client = await stack.start()
    for _ in range(2):
        answer = await client.post("/api/v1/optim_step", json={"model_id": RUN, "seq_id": 1})
        assert answer.json()["path"] == "/api/v1/optim_step"
    assert len(scripted.found) == 1
    assert scripted.found[0].endswith(f"{RUN}?account=local")
    await stack.control.service.stop()
    assert (await client.post("/api/v1/optim_step", json={"model_id": RUN})).status_code == 200
    unknown = await client.post("/api/v1/optim_step", json={"model_id": "ts-2:train:0"})
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (503, "unavailable")
    assert len(trainer.requests) == 3


async def test_the_least_recently_used_run_is_forgotten_first(stack, scripted):
    await stack.start()
    upstreams = Upstreams()
    feed = RouteFeed(stack.control.service.upstream, upstreams)
    calls = ControlCalls(feed, ManualClock(), Holds(request_s=0.0), remembered=2)
    for run in ("a", "b", "a", "c", "a", "b"):
        assert await calls.job_of("local", run) == POOL
    await calls.close()
    await upstreams.close()
    asked = [found.partition("?")[0].rpartition("/")[2] for found in scripted.found]
    assert asked == ["a", "b", "c", "b"]


async def test_a_model_waits_for_the_return_of_control(stack, scripted):
    stack.use_holds(Holds(request_s=60, look_again_s=0.01))
    await stack.trainer(POOL)
    client = await stack.start()
    await client.get("/v1/accounts")
    await stack.control.service.stop()
    waiting = asyncio.create_task(client.post("/api/v1/create_model", json=CREATE))
    await asyncio.sleep(0)
    await stack.control.service.start()
    assert (await waiting).json()["path"] == "/api/v1/create_model"
    assert len(scripted.placed) == 1


async def test_polls_wait_while_control_cannot_wake_what_they_are_for(stack):
    stack.route_trainer(POOL, None, "JOB_STATE_PAUSED", "parked")
    stack.route_deployment(SAMPLER, [])
    client = await stack.start()
    await client.get("/v1/accounts")
    await stack.control.service.stop()
    for request_id in (f"{POOL}.aa", f"{SAMPLER}.aa"):
        answer = await client.post("/api/v1/retrieve_future", json={"request_id": request_id})
        assert answer.status_code == 408


async def test_a_finished_sessions_runs_are_asked_for_again(stack, scripted):
    await stack.trainer(POOL)
    client = await stack.start()
    await client.post("/api/v1/optim_step", json={"model_id": RUN})
    await client.post(f"/api/v1/sessions/{SESSION}/finish", json={"reason": {"type": "success"}})
    error = {"code": "failed_precondition", "message": "session was finished"}
    scripted.refusal = 400, {"error": error}
    answer = await client.post("/api/v1/optim_step", json={"model_id": RUN})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "failed_precondition")


async def test_an_operation_without_a_model_is_refused(stack):
    client = await stack.start()
    answer = await client.post("/api/v1/optim_step", json={})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model_id")


async def test_a_parked_trainer_is_woken_once_and_the_request_goes_on(stack, scripted):
    stack.use_holds(Holds(request_s=60, future_s=60, look_again_s=60))
    trainer = await stack.service(POOL)
    stack.route_trainer(POOL, None, "JOB_STATE_PAUSED", "parked")
    scripted.on_wake = lambda: stack.route_trainer(POOL, trainer.upstream)
    client = await stack.start()
    answers = await asyncio.gather(
        client.post("/api/v1/optim_step", json={"model_id": RUN}),
        client.post("/api/v1/retrieve_future", json={"request_id": f"{POOL}.aa"}),
    )
    assert [answer.status_code for answer in answers] == [200, 200]
    assert set(scripted.woken) == {POOL}


async def test_polls_of_a_trainer_that_is_down_are_told_why(stack):
    stack.route_trainer(POOL, None, "JOB_STATE_PENDING", "waiting for 1 engine threads")
    client = await stack.start()
    answer = await client.post("/api/v1/retrieve_future", json={"request_id": f"{POOL}.aa"})
    assert answer.status_code == 408
    assert answer.json()["queue_state"] == "paused_capacity"
    assert "engine threads" in answer.json()["queue_state_reason"]


@pytest.mark.parametrize("state", ["JOB_STATE_FAILED", "JOB_STATE_CANCELLED", None])
async def test_a_training_future_that_no_waiting_helps_fails_and_is_never_404_or_410(stack, state):
    if state:
        stack.route_trainer(POOL, None, state, "no memory")
    client = await stack.start()
    answer = await client.post("/api/v1/retrieve_future", json={"request_id": f"{POOL}.aa"})
    assert answer.status_code == 200
    assert answer.json()["category"] == ("server" if state else "user")
    assert POOL in answer.json()["error"]


async def test_a_model_that_waits_for_room_is_promised_and_created_when_there_is_some(
    stack, scripted
):
    stack.route_trainer(POOL, None, "JOB_STATE_PENDING", "waiting for 1 engine threads")
    client = await stack.start()
    promised = await client.post("/api/v1/create_model", json=CREATE)
    assert promised.status_code == 200
    request_id = promised.json()["request_id"]
    assert request_id.startswith(f"{POOL}.")
    poll = {"request_id": request_id, "allow_metadata_only": True}
    waiting = await client.post("/api/v1/retrieve_future", json=poll)
    assert waiting.status_code == 408
    assert "engine threads" in waiting.json()["queue_state_reason"]
    trainer = await stack.trainer(POOL, answer=futures)
    created = await client.post("/api/v1/retrieve_future", json=poll)
    assert created.json()["polled"] == {**poll, "request_id": f"{POOL}.00000000000000ff"}
    assert trainer.requests == ["POST /api/v1/create_model", "POST /api/v1/retrieve_future"]
    assert [new.base_model for new in scripted.placed] == ["tiny"] * 3


async def test_a_promised_model_that_its_trainer_refuses_fails(stack, scripted):
    async def refuse(request: web.Request) -> web.StreamResponse:
        error = {"code": "too_long", "message": "no such adapter", "hint": "h"}
        return web.json_response({"error": error}, status=400)

    stack.route_trainer(POOL, None, "JOB_STATE_PENDING")
    client = await stack.start()
    promised = await client.post("/api/v1/create_model", json=CREATE)
    await stack.trainer(POOL, answer=refuse)
    failed = await client.post("/api/v1/retrieve_future", json=promised.json())
    assert failed.status_code == 200
    assert "no such adapter" in failed.json()["error"]


FORGED = {
    "empty": f"{POOL}.new-",
    "no request": f"{POOL}.new-AAAA",
    "no base64": f"{POOL}.new-?",
    "another path": creation_promise(POOL, Creation("../../internal/status", b"{}")),
    "another operation": creation_promise(POOL, Creation("optim_step", b"{}")),
    "another job": creation_promise(
        "pool-other", Creation("create_model", json.dumps(CREATE).encode())
    ),
    "no session": creation_promise(POOL, Creation("create_model", b"{}")),
}


@pytest.mark.parametrize("request_id", FORGED.values(), ids=FORGED)
async def test_a_promise_that_was_never_given_fails_and_reaches_nothing(
    stack, scripted, request_id
):
    trainers = [await stack.trainer(job, answer=futures) for job in (POOL, "pool-other")]
    client = await stack.start()
    answer = await client.post("/api/v1/retrieve_future", json={"request_id": request_id})
    assert (answer.status_code, answer.json()["category"]) == (200, "user")
    assert [request for trainer in trainers for request in trainer.requests] == []


async def test_a_request_too_large_for_a_promise_is_asked_to_come_again(stack, scripted):
    stack.route_trainer(POOL, None, "JOB_STATE_PENDING", "waiting")
    client = await stack.start()
    large = {**CREATE, "user_metadata": {"x": "y" * 20_000}}
    answer = await client.post("/api/v1/create_model", json=large)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")


async def test_samples_go_to_the_sampler_that_their_session_names(stack):
    replica = await stack.replica(SAMPLER)
    client = await stack.start()
    body = {"prompt": {"chunks": []}, "sampling_session_id": SAMPLING, "seq_id": 0}
    answer = await client.post("/api/v1/asample", json=body)
    assert answer.json()["path"] == "/api/v1/asample"
    poll = {"request_id": f"{SAMPLER}.00000000000000aa"}
    answer = await client.post("/api/v1/retrieve_future", json=poll)
    assert answer.json()["path"] == "/api/v1/retrieve_future"
    await client.post("/api/v1/cancel_future", json=poll)
    await client.post("/api/v1/join_sampling_session", json={"sampling_session_id": SAMPLING})
    assert len(replica.requests) == 4


async def test_a_sample_for_a_starting_sampler_waits_with_its_reason_and_is_sampled_again(
    stack, scripted
):
    client = await stack.start()
    body = {"sampling_session_id": SAMPLING, "seq_id": 0, "num_samples": 3}
    promised = (await client.post("/api/v1/asample", json=body)).json()
    assert scripted.woken == [SAMPLER]
    assert len(set(promised["sample_sequence_ids"])) == 3
    stack.route_deployment(SAMPLER, [], "CREATING", detail="waiting for 1 engine threads")
    poll = {"request_id": promised["request_id"]}
    waiting = await client.post("/api/v1/retrieve_future", json=poll)
    assert waiting.status_code == 408
    assert waiting.json()["queue_state"] == "paused_capacity"
    assert "engine threads" in waiting.json()["queue_state_reason"]
    await stack.replica(SAMPLER)
    assert (await client.post("/api/v1/retrieve_future", json=poll)).status_code == 410


async def test_a_poll_is_held_until_the_sampler_is_up(stack, scripted):
    stack.use_holds(Holds(request_s=0, future_s=60, look_again_s=60))
    client = await stack.start()
    body = {"sampling_session_id": SAMPLING, "seq_id": 0}
    promised = (await client.post("/api/v1/asample", json=body)).json()
    stack.route_deployment(SAMPLER, [], "CREATING")
    waiting = asyncio.create_task(client.post("/api/v1/retrieve_future", json=promised))
    while len(scripted.woken) < 2:
        await asyncio.sleep(0)
    await stack.replica(SAMPLER)
    assert (await waiting).status_code == 410


async def test_a_samplers_future_waits_while_it_restarts_and_is_gone_with_its_deployment(
    stack, scripted
):
    stack.route_deployment(SAMPLER, [], "READY")
    client = await stack.start()
    poll = {"request_id": f"{SAMPLER}.00000000000000aa"}
    assert (await client.post("/api/v1/retrieve_future", json=poll)).status_code == 408
    scripted.refusal = 404, {"error": {"code": "not_found", "message": "no sampler"}}
    assert (await client.post("/api/v1/retrieve_future", json=poll)).status_code == 410


async def test_a_failed_sampler_says_why(stack, scripted):
    stack.route_deployment(SAMPLER, [], "FAILED")
    client = await stack.start()
    body = {"sampling_session_id": SAMPLING, "seq_id": 0}
    refused = await client.post("/api/v1/asample", json=body)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "failed_precondition")
    poll = {"request_id": f"{SAMPLER}.00000000000000aa"}
    failed = await client.post("/api/v1/retrieve_future", json=poll)
    assert (failed.status_code, failed.json()["category"]) == (200, "server")


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"base_model": "tiny", "prompt": {}}, "unsupported"),
        ({"sampling_session_id": "nonsense"}, "invalid_argument"),
        ({"sampling_session_id": "job-1.00000000"}, "invalid_argument"),
        ({"sampling_session_id": SAMPLING, "num_samples": 0}, "invalid_argument"),
    ],
)
async def test_a_sample_of_nothing_is_refused(stack, body, code):
    client = await stack.start()
    answer = await client.post("/api/v1/asample", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, code)


async def test_an_ephemeral_save_wakes_the_sampler_that_will_sample_it(stack, scripted):
    await stack.trainer(POOL)
    client = await stack.start()
    named = {"model_id": RUN, "seq_id": 1, "path": "ckpt"}
    await client.post("/api/v1/save_weights_for_sampler", json=named)
    assert scripted.woken == []
    ephemeral = {"model_id": RUN, "seq_id": 2, "sampling_session_seq_id": 0}
    await client.post("/api/v1/save_weights_for_sampler", json=ephemeral)
    while not scripted.woken:
        await asyncio.sleep(0)
    assert scripted.woken == [SAMPLER]


async def test_cancelling_what_is_gone_succeeds_and_training_is_not_cancelled(stack, scripted):
    client = await stack.start()
    gone = {"request_id": f"{SAMPLER}.00000000000000aa"}
    assert (await client.post("/api/v1/cancel_future", json=gone)).status_code == 200
    training = {"request_id": f"{POOL}.00000000000000aa"}
    refused = await client.post("/api/v1/cancel_future", json=training)
    assert refused.json()["error"]["code"] == "unsupported"


async def test_protobuf_is_routed_by_its_model_and_forwarded_byte_for_byte(stack, scripted):
    from homefire.wire import tinker_public_pb2 as pb

    await stack.trainer(POOL, answer=echo)
    client = await stack.start()
    body = pb.ForwardBackwardRequest(model_id=RUN, seq_id=3, forward_only=True).SerializeToString()
    headers = {"content-type": "application/x-protobuf", "accept": "application/x-protobuf"}
    answer = await client.post("/api/v1/forward_backward", content=body, headers=headers)
    assert answer.json()["body"].encode("latin-1") == body
    assert answer.json()["headers"]["accept"] == "application/x-protobuf"


async def test_a_completion_of_a_base_model_wakes_the_parked_sampler_that_answers_for_it(
    stack, scripted
):
    stack.use_holds(Holds(request_s=60, look_again_s=60))
    stack.route_deployment(SAMPLER, [], "READY")
    replica = await stack.service("woken")
    scripted.on_wake = lambda: stack.route_deployment(SAMPLER, [replica.upstream])
    client = await stack.start()
    answer = await client.post("/v1/completions", json={"model": SAMPLER, "prompt": "x"})
    assert answer.json()["path"] == "/v1/completions"
    assert scripted.woken == [SAMPLER]
