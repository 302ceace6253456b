"""The inference plane: which replica serves, streaming, and clients that go away."""

from __future__ import annotations

import asyncio
import io
import json

import aiohttp
import msgspec
import pytest
import zstandard
from aiohttp import web

from homefire.gateway import inference_plane
from homefire.gateway.replica_choice import PREFIX_SLACK, choose_replica, routing_prefix
from homefire.gateway.routing import Holds
from homefire.wire.errors import HomefireError, UnknownSnapshot, error_body
from homefire.wire.internal import SnapshotRef, Wake
from homefire.wire.specs import Upstream

COMPLETIONS = "/inference/v1/completions"
CHAT = "/v1/chat/completions"
REPLICAS = [Upstream(f"/run/{name}.sock", "s") for name in "abcd"]


@pytest.mark.parametrize(
    "path",
    [
        COMPLETIONS,
        "/inference/v1/chat/completions",
        "/inference/v1/generate",
        "/v1/completions",
        "/v1/chat/completions",
    ],
)
async def test_the_body_reaches_the_replica_unchanged(stack, path):
    await stack.replica()
    client = await stack.start()
    body = b'{ "model":"accounts/local/deployments/dep@base",  "prompt": [1, 2] }'
    answer = await client.post(path, content=body, headers={"content-type": "application/json"})
    assert answer.json()["body"].encode() == body
    assert answer.json()["path"] == path


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_argument"),
        (b"[]", "invalid_argument"),
        (b"{", "invalid_argument"),
        (b'{"model": 5}', "invalid_argument"),
        (b'{"model": "nope"}', "unknown_deployment"),
    ],
)
async def test_a_body_that_names_no_deployment_is_a_400(stack, body, code):
    await stack.replica()
    client = await stack.start()
    answer = await client.post(COMPLETIONS, content=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, code)


async def test_an_unknown_model_is_the_404_below_v1_that_openai_clients_expect(stack):
    await stack.replica("serving")
    client = await stack.start()
    answer = await client.post("/v1/chat/completions", json={"model": "nope"})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert error["hint"] == "existing deployments: serving"


async def test_an_unknown_deployment_lists_those_that_exist(stack):
    await stack.replica("serving")
    client = await stack.start()
    answer = await client.post(COMPLETIONS, json={"model": "accounts/local/deployments/nope"})
    assert answer.json()["error"]["hint"] == "existing deployments: serving"


async def test_a_compressed_body_is_read_for_its_model_and_forwarded_as_sent(stack):
    seen: list[bytes] = []

    async def keep(request: web.Request) -> web.Response:
        seen.append(await request.content.read())
        return web.json_response({})

    await stack.replica(answer=keep)
    client = await stack.start()
    body = zstandard.compress(b'{"model": "dep"}')
    answer = await client.post(COMPLETIONS, content=body, headers={"content-encoding": "zstd"})
    assert answer.status_code == 200
    assert seen == [body]


async def test_a_body_over_the_cap_is_refused(stack, monkeypatch):
    monkeypatch.setattr(inference_plane, "_MAX_BODY_BYTES", 100)
    replica = await stack.replica()
    client = await stack.start()
    answer = await client.post(COMPLETIONS, json={"model": "dep", "prompt": [1] * 100})
    assert (answer.status_code, replica.requests) == (413, [])


async def test_a_deployment_without_replicas_is_held_until_one_answers(stack):
    stack.use_holds(Holds(request_s=60, look_again_s=60))
    stack.route_deployment("dep", [], state="CREATING")
    client = await stack.start()
    waiting = asyncio.create_task(client.post(COMPLETIONS, json={"model": "dep"}))
    while not any("after" in seen for seen in stack.control.service.requests):
        await asyncio.sleep(0)
    await stack.replica()
    assert (await waiting).status_code == 200


async def test_a_deployment_that_stays_without_replicas_is_a_503_with_retry_after(stack):
    stack.route_deployment("dep", [], state="CREATING")
    client = await stack.start()
    answer = await client.post(COMPLETIONS, json={"model": "dep"})
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")


async def test_a_failed_deployment_is_refused_at_once(stack):
    stack.use_holds(Holds(request_s=60, look_again_s=60))
    stack.route_deployment("dep", [], state="FAILED")
    client = await stack.start()
    answer = await client.post(COMPLETIONS, json={"model": "dep"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "failed_precondition")


async def test_a_replica_that_refuses_connections_is_passed_over(stack):
    replica = await stack.replica()
    dead = Upstream(str(stack.directory / "dead.sock"), "s")
    stack.route_deployment("dep", [dead, replica.upstream])
    client = await stack.start()
    answers = [await client.post(COMPLETIONS, json={"model": "dep"}) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200] * 4
    assert len(replica.requests) == 4


class Samplers:
    """Control's part of finding and waking samplers, which remembers what it was asked."""

    def __init__(self, stack) -> None:
        self.asked: list[SnapshotRef] = []
        self.woken: list[str] = []
        self.paths: list[str] = []
        self.on_wake = lambda: None
        self.refusal: HomefireError | None = None
        stack.control.answer_root = self.answer

    async def answer(self, request: web.Request) -> web.Response:
        body = await request.read()
        if self.refusal is not None:
            error = error_body(self.refusal, request_id="r1")
            return web.json_response(error, status=self.refusal.http_status)
        if request.path.endswith("/wake"):
            self.paths.append(request.path)
            self.woken.append(msgspec.json.decode(body, type=Wake).service)
            self.on_wake()
            return web.json_response({})
        self.asked.append(msgspec.json.decode(body, type=SnapshotRef))
        return web.json_response({"sampler": "pool-1-sampler"})


PATH = "tinker://ts-1:train:0/sampler_weights/step_1"


async def test_a_snapshot_is_answered_by_the_sampler_of_its_run_which_is_asked_for_once(stack):
    samplers = Samplers(stack)
    replica = await stack.replica("pool-1-sampler")
    client = await stack.start()
    for name in ("step_1", "step_2"):
        body = {"model": PATH.replace("step_1", name), "prompt": [1]}
        answer = await client.post("/v1/completions", json=body)
        assert json.loads(answer.json()["body"]) == body
    assert samplers.asked == [SnapshotRef("local", PATH)]
    assert len(replica.requests) == 2


async def test_a_parked_sampler_is_woken_by_the_request_that_names_it(stack):
    samplers = Samplers(stack)
    stack.route_deployment("pool-1-sampler", [])
    parked = await stack.service("pool-1-sampler-woken")
    samplers.on_wake = lambda: stack.route_deployment("pool-1-sampler", [parked.upstream])
    client = await stack.start()
    for model in (PATH, "pool-1-sampler"):
        answer = await client.post("/v1/completions", json={"model": model, "prompt": [1]})
        assert answer.status_code == 200
    assert samplers.woken == ["pool-1-sampler"]


async def test_a_deployment_scaled_to_zero_is_woken_once_by_the_requests_that_come(stack):
    control = Samplers(stack)
    stack.route_deployment("dep", [], is_asleep=True)
    replica = await stack.service("dep-woken")
    control.on_wake = lambda: stack.route_deployment("dep", [replica.upstream])
    client = await stack.start()
    answers = await asyncio.gather(
        *(client.post(COMPLETIONS, json={"model": "dep", "prompt": [1]}) for _ in range(3))
    )
    assert [answer.status_code for answer in answers] == [200] * 3
    assert control.paths == ["/internal/deployments/wake"]


@pytest.mark.parametrize(
    ("model", "code"), [(PATH, "unknown_snapshot"), ("tinker://x", "invalid_argument")]
)
async def test_a_snapshot_that_is_not_there_is_a_400_by_name(stack, model, code):
    Samplers(stack).refusal = UnknownSnapshot("no such snapshot", field="model")
    client = await stack.start()
    answer = await client.post("/v1/completions", json={"model": model, "prompt": [1]})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, code)


async def test_the_requests_of_a_session_go_to_one_replica(stack):
    replicas = [await stack.replica() for _ in range(3)]
    client = await stack.start()
    for _ in range(4):
        await client.post(COMPLETIONS, json={"model": "dep", "user": "u"})
        for header in ("x-session-affinity", "x-session-id"):
            await client.post(COMPLETIONS, json={"model": "dep"}, headers={header: "u"})
    assert sorted(len(replica.requests) for replica in replicas) == [0, 0, 12]


def test_without_a_session_the_least_busy_replica_serves():
    busy = {"/run/a.sock": 3, "/run/b.sock": 1, "/run/d.sock": 2}
    assert choose_replica(REPLICAS, in_flight=busy) is REPLICAS[2]
    assert choose_replica([], in_flight={}) is None


def test_a_replica_that_goes_moves_only_its_own_sessions():
    sessions = [f"session-{n}" for n in range(200)]
    before = {s: choose_replica(REPLICAS, in_flight={}, session=s) for s in sessions}
    after = {s: choose_replica(REPLICAS[:3], in_flight={}, session=s) for s in sessions}
    assert {before[s] for s in sessions} == set(REPLICAS)
    assert all(before[s] == after[s] for s in sessions if before[s] is not REPLICAS[3])


async def test_requests_that_begin_alike_go_to_one_replica(stack):
    replicas = [await stack.replica() for _ in range(3)]
    client = await stack.start()
    system = {"role": "system", "content": "You sort digits. " * 80}
    for turn in range(3):
        prompt = [*range(400), *range(turn)]
        await client.post(COMPLETIONS, json={"model": "dep", "prompt": prompt})
        messages = [system, *[{"role": "user", "content": "527"}] * turn]
        await client.post(CHAT, json={"model": "dep", "messages": messages})
    counts = [len(replica.requests) for replica in replicas]
    assert sum(counts) == 6
    assert all(count % 3 == 0 for count in counts)


def test_a_prefix_s_replica_is_passed_over_when_it_is_much_busier_than_another():
    prefix = routing_prefix(memoryview(b"[" + b"1," * 400))
    holder = choose_replica(REPLICAS, in_flight={}, prefix=prefix)
    assert holder is not None
    almost, much = PREFIX_SLACK - 1, PREFIX_SLACK
    assert choose_replica(REPLICAS, in_flight={holder.socket: almost}, prefix=prefix) is holder
    assert choose_replica(REPLICAS, in_flight={holder.socket: much}, prefix=prefix) is not holder


def test_prefixes_spread_over_all_replicas_and_short_prompts_have_none():
    prompts = [memoryview(str([n, *range(300)]).encode()) for n in range(100)]
    chosen = {choose_replica(REPLICAS, in_flight={}, prefix=routing_prefix(p)) for p in prompts}
    assert chosen == set(REPLICAS)
    assert routing_prefix(memoryview(b"[1, 2, 3]")) == b""


class Streaming:
    """A replica that streams what it is told to and notices when its caller leaves."""

    def __init__(self) -> None:
        self.proceed = asyncio.Event()
        self.started = asyncio.Event()
        self.left = asyncio.Event()

    async def answer(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        try:
            await response.prepare(request)
            await response.write(b"data: one\n\n")
            self.started.set()
            await self.proceed.wait()
            await response.write(b"data: two\n\n")
        except (asyncio.CancelledError, ConnectionError):
            self.left.set()
            raise
        return response


async def test_a_stream_passes_chunk_by_chunk(stack):
    streaming = Streaming()
    await stack.replica(answer=streaming.answer)
    client = await stack.serve()
    async with client.post(COMPLETIONS, json={"model": "dep"}) as answer:
        assert answer.headers["content-type"] == "text/event-stream"
        assert await answer.content.readany() == b"data: one\n\n"
        streaming.proceed.set()
        assert await answer.read() == b"data: two\n\n"


async def test_a_client_that_leaves_a_stream_frees_the_replica(stack):
    streaming = Streaming()
    await stack.replica(answer=streaming.answer)
    client = await stack.serve()
    answer = await client.post(COMPLETIONS, json={"model": "dep"})
    await answer.content.readany()
    answer.close()
    await asyncio.wait_for(streaming.left.wait(), 10)


async def test_a_client_that_leaves_before_the_answer_frees_the_replica(stack):
    arrived, left = asyncio.Event(), asyncio.Event()

    async def never(request: web.Request) -> web.StreamResponse:
        arrived.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            left.set()
            raise
        return web.Response()

    await stack.replica(answer=never)
    client = await stack.serve()
    asking = asyncio.create_task(client.post(COMPLETIONS, json={"model": "dep"}))
    await asyncio.wait_for(arrived.wait(), 10)
    asking.cancel()
    await asyncio.wait_for(left.wait(), 10)


async def test_a_stream_that_breaks_off_does_not_look_complete(stack):
    async def break_off(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"data: one\n\n")
        assert request.transport is not None
        request.transport.abort()
        return response

    await stack.replica(answer=break_off)
    client = await stack.serve()
    with pytest.raises(aiohttp.ClientError):
        async with client.post(COMPLETIONS, json={"model": "dep"}) as answer:
            await answer.read()


async def test_a_large_training_body_is_streamed_and_arrives_whole(stack):
    sizes: list[int] = []

    async def count(request: web.Request) -> web.Response:
        size = 0
        async for chunk in request.content.iter_any():
            size += len(chunk)
        sizes.append(size)
        return web.json_response({"size": size})

    await stack.trainer(answer=count)
    client = await stack.serve()
    path = "/training/v1/rlorTrainerJobs/local/job-1/api/v1/forward_backward"
    async with client.post(path, data=io.BytesIO(b"x" * 3_300_000)) as answer:
        assert json.loads(await answer.read()) == {"size": 3_300_000}

    async def pieces():
        for _ in range(5):
            yield b"y" * 100_000

    async with client.post(path, data=pieces()) as answer:
        assert json.loads(await answer.read()) == {"size": 500_000}
    assert sizes == [3_300_000, 500_000]


async def test_a_large_prompt_is_read_and_forwarded_whole(stack):
    await stack.replica(answer=_size)
    client = await stack.serve()
    prompt = json.dumps({"model": "dep", "prompt": [7] * 500_000}).encode()
    async with client.post(COMPLETIONS, data=io.BytesIO(prompt)) as answer:
        assert json.loads(await answer.read()) == {"size": len(prompt)}


async def _size(request: web.Request) -> web.Response:
    return web.json_response({"size": len(await request.read())})


async def test_a_large_answer_arrives_whole(stack):
    async def large(request: web.Request) -> web.Response:
        return web.Response(body=b"z" * 1_000_000)

    await stack.trainer(answer=large)
    client = await stack.serve()
    path = "/training/v1/rlorTrainerJobs/local/job-1/api/v1/retrieve_future"
    async with client.post(path, data=b"{}") as answer:
        assert len(await answer.read()) == 1_000_000
        assert answer.headers["content-length"] == "1000000"
