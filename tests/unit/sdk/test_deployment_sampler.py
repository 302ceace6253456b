"""The sampler against a server that does what each request's turn tells it to."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from typing import Any

import httpx
import msgspec
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from homefire.sdk import (
    AdaptiveConcurrencyController,
    DeploymentSampler,
    SamplingRetry,
    WeightsIdentity,
    WeightsMismatch,
    WeightsSpan,
    loop_session,
)

_MODEL = "accounts/local/deployments/research-serving"


def event(**fields) -> bytes:
    return b"data: " + msgspec.json.encode(fields) + b"\n\n"


def streamed(
    tokens: list[int],
    *,
    identity: str = "step_0-ab",
    perf: dict | None = None,
    logprobs: bool = True,
    spans: list[dict] | None = None,
) -> bytes:
    """A stream of one chunk per token, then the final one."""
    chunks = []
    for token in tokens:
        content = [{"token_id": token, "logprob": -0.5, "sampling_logprob": -0.5}]
        choice = {"index": 0, "text": "x", "finish_reason": None}
        if logprobs:
            choice["logprobs"] = {"content": content}
        chunks.append(event(id="c", model=_MODEL, choices=[choice]))
    last = {
        "index": 0,
        "text": "",
        "finish_reason": "length",
        "raw_output": {"completion_token_ids": tokens},
    }
    final = {"homefire": {"weights": {"identity": identity, "digest": "9f"}}}
    if spans is not None:
        final["homefire"]["spans"] = [spans]
    if perf is not None:
        final["perf_metrics"] = perf
    return b"".join(chunks) + event(choices=[last], **final) + b"data: [DONE]\n\n"


class InferenceStub:
    """Answers completions in turn; the last turn stays. A turn is a stream's bytes, (status, body
    [, headers]), or a coroutine function that gives one of them."""

    def __init__(self) -> None:
        self.forget()
        self.app = Starlette(
            routes=[Route("/inference/v1/completions", self._complete, methods=["POST"])]
        )

    def forget(self) -> None:
        self.turns: list[Any] = [streamed([7, 8])]
        self.bodies: list[dict] = []
        self.headers: list[dict[str, str]] = []

    async def _complete(self, request: Request) -> Response:
        self.bodies.append(msgspec.json.decode(await request.body()))
        self.headers.append(dict(request.headers))
        turn = self.turns.pop(0) if len(self.turns) > 1 else self.turns[0]
        if callable(turn):
            turn = await turn()
        if isinstance(turn, bytes):
            headers = {
                "x-homefire-weights": "step_0-ab; sha=9f",
                "fireworks-prefill-queue-duration": "0.125",
            }
            return Response(turn, media_type="text/event-stream", headers=headers)
        status, body, *headers = turn
        return Response(
            msgspec.json.encode(body), status_code=status, headers=headers[0] if headers else None
        )


class Tokenizer:
    def apply_chat_template(self, conversation, **options):
        assert options == {
            "tokenize": True,
            "add_generation_prompt": True,
            "return_dict": False,
        }
        return [5, 6, 7][: len(conversation[0]["content"])]


@pytest.fixture(scope="module")
def served_inference(serve_module) -> tuple[InferenceStub, str]:
    stub = InferenceStub()
    return stub, serve_module(stub.app)


@pytest.fixture
def inference(served_inference) -> InferenceStub:
    served_inference[0].forget()
    return served_inference[0]


@pytest.fixture
def make_sampler(inference, served_inference, manual_time) -> Callable[..., DeploymentSampler]:
    url = served_inference[1]

    def make(**options: Any) -> DeploymentSampler:
        options = {"tokenizer": Tokenizer(), "sleep": manual_time.sleep_async, **options}
        return DeploymentSampler(url, _MODEL, "fw_test", **options)

    return make


async def test_a_conversation_is_sent_as_token_ids_in_the_fireworks_sdk_s_body(
    make_sampler, inference
):
    messages = [{"role": "user", "content": "abc"}]
    (completion,) = await make_sampler().sample_with_tokens(messages, logprobs=True)
    assert inference.bodies == [
        {
            "model": _MODEL,
            "prompt": [5, 6, 7],
            "n": 1,
            "max_tokens": 1024,
            "temperature": 1.0,
            "stream": True,
            "perf_metrics_in_response": True,
            "raw_output": True,
            "logprobs": True,
        }
    ]
    headers = inference.headers[0]
    assert headers["authorization"] == "Bearer fw_test"
    assert headers["x-api-key"] == "fw_test"
    assert completion.full_tokens == [5, 6, 7, 7, 8]
    assert completion.inference_logprobs == [-0.5, -0.5]
    assert completion.weights == WeightsIdentity("step_0-ab", "9f")


async def test_options_pass_through_untouched(make_sampler, inference):
    await make_sampler().sample_with_prompt_tokens(
        [1, 2, 3],
        max_tokens=5,
        temperature=0.7,
        stop=["</s>"],
        logprobs=True,
        top_logprobs=1,
        include_routing_matrix=True,
        user="sess-1",
    )
    assert inference.bodies == [
        {
            "model": _MODEL,
            "prompt": [1, 2, 3],
            "n": 1,
            "max_tokens": 5,
            "temperature": 0.7,
            "stream": True,
            "perf_metrics_in_response": True,
            "raw_output": True,
            "logprobs": True,
            "top_logprobs": 1,
            "include_routing_matrix": True,
            "user": "sess-1",
            "stop": ["</s>"],
        }
    ]


async def test_n_completions_are_n_requests(make_sampler, inference):
    completions = await make_sampler().sample_with_prompt_tokens([1], n=5)
    assert len(completions) == len(inference.bodies) == 5
    assert {body["n"] for body in inference.bodies} == {1}


async def test_a_prompt_that_fills_the_length_is_not_sent(make_sampler, inference):
    assert await make_sampler().sample_with_prompt_tokens([1, 2, 3], max_seq_len=3) == []
    assert inference.bodies == []


async def test_completions_that_are_too_long_are_dropped(make_sampler, inference):
    inference.turns = [streamed([7, 8, 9]), streamed([7])]
    completions = await make_sampler(max_concurrency=1).sample_with_prompt_tokens(
        [1, 2], n=2, max_seq_len=4
    )
    assert [completion.completion_len for completion in completions] == [1]


async def test_completions_of_other_weights_are_refused(make_sampler, inference):
    sampler = make_sampler()
    assert await sampler.sample_with_prompt_tokens([1], expect_identity="step_0-ab")
    with pytest.raises(WeightsMismatch, match="step_1-ab"):
        await sampler.sample_with_prompt_tokens([1], expect_identity="step_1-ab")


async def test_the_server_is_told_which_weights_and_its_refusal_is_a_mismatch(
    make_sampler, inference
):
    inference.turns = [(412, {"error": {"message": "'step_1-ab' was asked for"}})]
    with pytest.raises(WeightsMismatch, match="'step_1-ab' was asked for"):
        await make_sampler().sample_with_prompt_tokens([1], expect_identity="step_1-ab")
    assert [body["expect_identity"] for body in inference.bodies] == ["step_1-ab"]


SPANS = [
    {"start": 0, "end": 2, "identity": "step_0-ab", "digest": "9f"},
    {"start": 2, "end": 3, "identity": "step_1-ab", "digest": "a0"},
]


async def test_every_token_of_a_completion_names_its_weights(make_sampler, inference):
    inference.turns = [streamed([7, 8, 9]), streamed([7, 8, 9], spans=SPANS)]
    sampler = make_sampler()
    (plain,) = await sampler.sample_with_prompt_tokens([1])
    (moved,) = await sampler.sample_with_prompt_tokens([1])
    old, new = WeightsIdentity("step_0-ab", "9f"), WeightsIdentity("step_1-ab", "a0")
    assert plain.weights_spans == [WeightsSpan(0, 3, old)]
    assert moved.weights == old
    assert moved.weights_spans == [WeightsSpan(0, 2, old), WeightsSpan(2, 3, new)]


async def test_a_completion_that_went_on_under_other_weights_is_refused(make_sampler, inference):
    inference.turns = [streamed([7, 8, 9], spans=SPANS)]
    with pytest.raises(WeightsMismatch, match="step_1-ab"):
        await make_sampler().sample_with_prompt_tokens([1], expect_identity="step_0-ab")


async def test_server_metrics_come_from_the_stream_else_from_the_headers(make_sampler, inference):
    inference.turns = [streamed([7], perf={"prefill-queue-duration": "0.5"}), streamed([7])]
    sampler = make_sampler()
    await sampler.sample_with_prompt_tokens([1])
    await sampler.sample_with_prompt_tokens([1])
    drained = sampler.drain_metrics()
    assert [metrics.prefill_queue_duration for metrics in drained] == [0.5, 0.125]
    assert all(metrics.client_ttft is not None for metrics in drained)
    assert sampler.drain_metrics() == []


@pytest.mark.parametrize("status", [408, 429, 502, 503, 504])
async def test_transient_refusals_are_tried_again_with_growing_pauses(
    make_sampler, inference, manual_time, status
):
    inference.turns = [*[(status, {"error": {"message": "busy"}})] * 4, streamed([7])]
    assert await make_sampler().sample_with_prompt_tokens([1])
    assert [round(seconds / 2.0**i, 9) for i, seconds in enumerate(manual_time.slept)] == [
        pytest.approx(2.0, rel=0.5)
    ] * 4
    assert len({headers["x-request-id"] for headers in inference.headers}) == 1


async def test_seven_attempts_are_made_and_the_last_error_is_raised(
    make_sampler, inference, manual_time
):
    inference.turns = [(503, {"error": {"message": "no replica"}})]
    with pytest.raises(httpx.HTTPStatusError, match="HTTP 503: no replica"):
        await make_sampler().sample_with_prompt_tokens([1])
    assert len(inference.bodies) == 7
    assert max(manual_time.slept) <= 45


async def test_refused_attempts_shrink_an_adaptive_window_once_for_the_burst(
    make_sampler, inference
):
    controller = AdaptiveConcurrencyController(16, monotonic=lambda: 0.0)
    inference.turns = [(429, {}), (503, {}), (400, {"error": {"message": "bad"}})]
    with pytest.raises(httpx.HTTPStatusError, match="bad"):
        await make_sampler(concurrency_controller=controller).sample_with_prompt_tokens([1])
    assert controller.window_size == 8
    assert controller.step_completed()["refusals"] == 2


async def test_the_server_s_retry_after_is_honoured_up_to_a_cap(
    make_sampler, inference, manual_time
):
    inference.turns = [
        (429, {}, {"retry-after": "1"}),
        (429, {}, {"retry-after": "600"}),
        streamed([7]),
    ]
    await make_sampler().sample_with_prompt_tokens([1])
    assert manual_time.slept == [1.0, 30.0]


@pytest.mark.parametrize("status", [404, 425])
async def test_a_deployment_that_swaps_is_asked_again_every_five_seconds(
    make_sampler, inference, manual_time, status
):
    inference.turns = [*[(status, {})] * 10, streamed([7])]
    assert await make_sampler().sample_with_prompt_tokens([1])
    assert manual_time.slept == [5.0] * 10
    inference.turns = [(status, {"message": "still loading"})]
    with pytest.raises(httpx.HTTPStatusError, match="still loading"):
        await make_sampler().async_completions_stream(
            [1], hotload_max_retries=2, hotload_retry_interval=0.5
        )
    assert manual_time.slept[10:] == [0.5, 0.5]


@pytest.mark.parametrize("status", [400, 401, 403, 412, 413, 422, 500])
async def test_permanent_refusals_are_raised_at_once_with_the_server_s_words(
    make_sampler, inference, manual_time, status
):
    inference.turns = [(status, {"error": {"message": "token 999 is out of range"}})]
    with pytest.raises(httpx.HTTPStatusError, match="token 999 is out of range") as caught:
        await make_sampler().sample_with_prompt_tokens([999])
    assert caught.value.response.status_code == status
    assert manual_time.slept == []


async def test_a_stream_cut_short_is_tried_again(make_sampler, inference, manual_time):
    inference.turns = [streamed([7, 8])[:200], streamed([7, 8])]
    (completion,) = await make_sampler().sample_with_prompt_tokens([1])
    assert completion.completion_len == 2
    assert len(manual_time.slept) == 1


async def test_an_error_inside_the_stream_is_tried_again_only_when_it_is_transient(
    make_sampler, inference, manual_time
):
    inference.turns = [event(error={"message": "draining", "status": 503}), streamed([7])]
    assert await make_sampler().sample_with_prompt_tokens([1])
    inference.turns = [event(error={"message": "bad stop", "status": 400})]
    with pytest.raises(httpx.HTTPStatusError, match="bad stop"):
        await make_sampler().sample_with_prompt_tokens([1])
    assert len(manual_time.slept) == 1


async def test_a_server_that_is_not_there_is_a_connect_error(manual_time):
    sampler = DeploymentSampler("http://127.0.0.1:1", _MODEL, "key", sleep=manual_time.sleep_async)
    with pytest.raises(httpx.ConnectError):
        await sampler.sample_with_prompt_tokens([1])
    assert len(manual_time.slept) == 6


async def test_missing_token_ids_are_not_tried_again(make_sampler, inference, manual_time):
    inference.turns = [event(choices=[{"index": 0, "text": "x", "finish_reason": "stop"}])]
    with pytest.raises(RuntimeError, match="completion_token_ids"):
        await make_sampler().sample_with_prompt_tokens([1])
    assert len(inference.bodies) == 1


async def test_the_raw_stream_gives_the_api_s_object_and_the_metrics(make_sampler, inference):
    response, metrics = await make_sampler().async_completions_stream([1, 2], max_tokens=4)
    assert response["choices"][0]["raw_output"]["completion_token_ids"] == [7, 8]
    assert response["model"] == _MODEL
    assert metrics.prefill_queue_duration == 0.125


class _Rendezvous:
    """Holds every request until `size` of them are there; remembers the largest crowd."""

    def __init__(self, size: int) -> None:
        self.size, self.present, self.most = size, 0, 0
        self._full = asyncio.Event()

    async def turn(self) -> bytes:
        self.present += 1
        self.most = max(self.most, self.present)
        if self.present >= self.size:
            self._full.set()
        await self._full.wait()
        await asyncio.sleep(0)
        self.present -= 1
        return streamed([7])


@pytest.mark.parametrize(
    "options",
    [
        {"max_concurrency": 3},
        {"concurrency_controller": AdaptiveConcurrencyController(initial_window=3)},
    ],
)
async def test_no_more_requests_than_the_window_are_in_flight(make_sampler, inference, options):
    meeting = _Rendezvous(3)
    inference.turns = [meeting.turn]
    assert len(await make_sampler(**options).sample_with_prompt_tokens([1], n=12)) == 12
    assert meeting.most == 3


async def test_the_controller_hears_the_queue_time_of_each_completion(make_sampler, inference):
    controller = AdaptiveConcurrencyController(initial_window=4)
    sampler = make_sampler(concurrency_controller=controller)
    await sampler.sample_with_prompt_tokens([1], n=6)
    summary = controller.step_completed()
    assert (summary["requests"], summary["avg_pq"]) == (6, 0.125)


async def test_a_failure_cancels_the_other_requests_and_frees_their_slots(make_sampler, inference):
    controller = AdaptiveConcurrencyController(initial_window=2)
    inference.turns = [(400, {"message": "bad"})]
    sampler = make_sampler(concurrency_controller=controller)
    with pytest.raises(httpx.HTTPStatusError, match="bad"):
        await sampler.sample_with_prompt_tokens([1], n=20)
    inference.turns = [streamed([7])]
    assert len(await sampler.sample_with_prompt_tokens([1], n=4)) == 4


def test_one_sampler_works_under_repeated_asyncio_run(make_sampler, inference):
    sampler = make_sampler(max_concurrency=4)
    for _ in range(3):
        assert len(asyncio.run(sampler.sample_with_prompt_tokens([1], n=8))) == 8


async def one_completion(url: str) -> int:
    sampler = DeploymentSampler(url, _MODEL, "key")
    return len(await sampler.sample_with_prompt_tokens([1]))


def test_samplers_of_a_step_leave_no_socket_behind(inference, served_inference, recwarn):
    _, url = served_inference
    for _ in range(3):
        assert asyncio.run(one_completion(url)) == 1
    gc.collect()
    assert loop_session._open == {}
    assert [str(warning.message) for warning in recwarn] == []


async def test_samplers_of_one_loop_share_its_connections(make_sampler):
    first = await loop_session.current_session()
    await make_sampler().sample_with_prompt_tokens([1])
    assert await loop_session.current_session() is first


@pytest.mark.parametrize(
    ("prompt", "options", "named"),
    [
        ([], {}, "prompt"),
        ([1], {"n": 0}, "n is 0"),
        ([1], {"max_tokens": -1}, "max_tokens"),
        ([1], {"temperature": -1.0}, "temperature"),
        ([1], {"temperature": float("nan")}, "temperature"),
    ],
)
async def test_bad_arguments_are_refused_by_name_without_a_request(
    make_sampler, inference, prompt, options, named
):
    with pytest.raises(ValueError, match=named):
        await make_sampler().sample_with_prompt_tokens(prompt, **options)
    assert inference.bodies == []


async def test_a_conversation_without_a_tokenizer_is_refused(make_sampler):
    with pytest.raises(ValueError, match="tokenizer is missing"):
        await make_sampler(tokenizer=None).sample_with_tokens([{"role": "user", "content": "a"}])


def test_a_controller_and_a_maximum_exclude_each_other():
    with pytest.raises(ValueError, match="not both"):
        DeploymentSampler(
            "http://s",
            _MODEL,
            "key",
            concurrency_controller=AdaptiveConcurrencyController(),
            max_concurrency=3,
        )


def test_pauses_double_vary_and_are_capped():
    retry = SamplingRetry()
    error = httpx.ReadError("cut")
    assert [retry.delay_s(attempt, error, 0.5) for attempt in range(7)] == [2, 4, 8, 16, 30, 30, 30]
    assert (retry.delay_s(0, error, 0.0), retry.delay_s(0, error, 0.999)) == (
        1.0,
        pytest.approx(3.0, rel=1e-3),
    )
