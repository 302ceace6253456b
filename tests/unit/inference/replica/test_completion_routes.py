from __future__ import annotations

import asyncio
import math
import threading
from typing import Any

import pytest

from homefire.inference.engine.opening import open_engine
from homefire.inference.engine.protocol import InferenceEngine, Publish
from homefire.wire.specs import ReplicaSpec
from unit.inference.caller import Caller
from unit.inference.canaries import Snapshots

GREEDY = {"temperature": 0}


def text_of(events: list[Any], index: int = 0) -> str:
    choices = [choice for event in events for choice in event["choices"]]
    return "".join(choice["text"] for choice in choices if choice["index"] == index)


def entries_of(events: list[Any]) -> list[Any]:
    return [
        entry
        for event in events
        for choice in event["choices"]
        if choice["logprobs"]
        for entry in choice["logprobs"]["content"]
    ]


async def test_a_whole_answer_has_openai_s_shape_and_names_its_weights(start_replica: Any) -> None:
    async with start_replica() as caller:
        answered = await caller.complete(prompt=[1, 2], max_tokens=5, ignore_eos=True)
        digest = (await caller.status()).digest
    answer = answered.json()
    assert answered.status == 200
    assert answer["object"] == "text_completion"
    assert answer["model"] == "accounts/local/models/tiny@base"
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 5,
        "total_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert answered.headers["x-homefire-weights"] == f"base; sha={digest}"
    assert answer["homefire"] == {"weights": {"identity": "base", "digest": digest}}
    assert float(answered.headers["fireworks-prefill-queue-duration"]) >= 0


async def test_a_stream_is_what_the_sampler_reads(start_replica: Any, snapshots: Snapshots) -> None:
    async with start_replica() as caller:
        await caller.hot_load(snapshots.base(65))
        answered = await caller.complete(
            prompt=[1, 2, 3],
            max_tokens=40,
            stream=True,
            logprobs=True,
            raw_output=True,
            perf_metrics_in_response=True,
        )
    events = answered.events()
    last = events[-1]
    assert answered.headers["content-type"].startswith("text/event-stream")
    assert answered.headers["x-homefire-weights"].startswith("step-65; sha=")
    assert text_of(events) == "A" * 40
    assert {event["object"] for event in events} == {"text_completion"}
    assert {event["model"] for event in events} == {"accounts/local/models/tiny@step-65"}
    assert [e["choices"][0]["finish_reason"] for e in events] == [None] * (len(events) - 1) + [
        "length"
    ]
    assert last["choices"][0]["raw_output"] == {
        "completion_token_ids": [65] * 40,
        "prompt_token_ids": [1, 2, 3],
        "completion": "A" * 40,
        "prompt_fragments": [],
    }
    assert last["usage"]["completion_tokens"] == 40
    assert last["homefire"]["weights"]["identity"] == "step-65"
    assert last["perf_metrics"]["prompt-tokens"] == 3
    assert last["perf_metrics"].keys() >= {
        "prefill-queue-duration",
        "weight-swap-wait",
        "generation-queue-duration",
        "num-concurrent-requests",
        "cached-prompt-tokens",
        "server-time-to-first-token",
        "server-processing-time",
    }
    assert not any("usage" in event for event in events[:-1])
    entries = entries_of(events)
    assert [entry["token_id"] for entry in entries] == [65] * 40
    assert [entry["text_offset"] for entry in entries] == list(range(40))
    assert entries[0]["token"] == "A"
    assert entries[0]["bytes"] == [65]
    assert entries[0]["logprob"] == pytest.approx(entries[0]["sampling_logprob"])


async def test_raw_and_sampling_logprobs_are_told_apart(start_replica: Any) -> None:
    async with start_replica() as caller:
        answer = (
            await caller.complete(
                prompt=[1], max_tokens=30, temperature=0.5, top_k=2, logprobs=True, top_logprobs=2
            )
        ).json()
    for entry in answer["choices"][0]["logprobs"]["content"]:
        raw = [top["logprob"] for top in entry["top_logprobs"]]
        weights = [math.exp(logprob / 0.5) for logprob in raw]
        chances = {
            top["token_id"]: weight / sum(weights)
            for top, weight in zip(entry["top_logprobs"], weights, strict=True)
        }
        assert entry["logprob"] == pytest.approx(raw[list(chances).index(entry["token_id"])])
        assert math.exp(entry["sampling_logprob"]) == pytest.approx(chances[entry["token_id"]])


async def test_an_integer_asks_for_the_older_logprobs(start_replica: Any) -> None:
    async with start_replica() as caller:
        answer = (
            await caller.complete(prompt=[97], max_tokens=2, echo=True, logprobs=1, **GREEDY)
        ).json()
    logprobs = answer["choices"][0]["logprobs"]
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["token_ids"][0] == 97
    assert logprobs["tokens"][0] == "a"
    assert logprobs["text_offset"][:2] == [0, 1]
    assert [tops is None for tops in logprobs["top_logprobs"]] == [True, False, False]
    assert len(logprobs["tokens"]) == 3


async def test_the_older_logprobs_know_the_likeliest_token_of_those_that_look_alike(
    start_replica: Any, snapshots: Snapshots
) -> None:
    async with start_replica() as caller:
        await caller.hot_load(snapshots.base(0xE2))
        answer = (await caller.complete(prompt=[97], max_tokens=1, logprobs=5, **GREEDY)).json()
    logprobs = answer["choices"][0]["logprobs"]
    (tops,) = logprobs["top_logprobs"]
    assert logprobs["tokens"] == ["bytes:\\xe2"]
    assert tops["bytes:\\xe2"] == max(tops.values()) == logprobs["token_logprobs"][0]
    assert len(tops) == 5


async def test_the_older_logprobs_have_the_sampled_token_even_when_it_is_not_likely(
    start_replica: Any,
) -> None:
    async with start_replica() as caller:
        answer = (
            await caller.complete(prompt=[97], max_tokens=20, logprobs=1, temperature=50, seed=1)
        ).json()
    logprobs = answer["choices"][0]["logprobs"]
    tops = logprobs["top_logprobs"]
    assert {len(entry) for entry in tops} >= {2}
    for name, logprob, entry in zip(
        logprobs["tokens"], logprobs["token_logprobs"], tops, strict=True
    ):
        assert entry[name] == logprob


@pytest.mark.parametrize("logprobs", [True, 2])
async def test_tokens_may_be_named_by_their_ids(start_replica: Any, logprobs: Any) -> None:
    async with start_replica() as caller:
        fields = {"prompt": [97], "max_tokens": 3, "seed": 1, "return_token_ids": True}
        answer = (
            await caller.complete(
                logprobs=logprobs, top_logprobs=2, return_tokens_as_token_ids=True, **fields
            )
        ).json()
    choice = answer["choices"][0]
    names = [f"token_id:{token}" for token in choice["token_ids"]]
    if logprobs is True:
        assert [entry["token"] for entry in choice["logprobs"]["content"]] == names
        tops = [top for entry in choice["logprobs"]["content"] for top in entry["top_logprobs"]]
        assert [top["token"] for top in tops] == [f"token_id:{top['token_id']}" for top in tops]
    else:
        assert choice["logprobs"]["tokens"] == names
        assert all(name in tops for name, tops in zip(names, choice["logprobs"]["top_logprobs"], strict=True))  # fmt: skip


async def test_usage_says_what_an_earlier_request_had_computed(
    start_replica: Any, snapshots: Snapshots
) -> None:
    async def cached(caller: Caller) -> tuple[int, int]:
        body = {"prompt": [*range(100)], "max_tokens": 2, "perf_metrics_in_response": True}
        answer = (await caller.complete(**body)).json()
        details = answer["usage"]["prompt_tokens_details"]
        return details["cached_tokens"], answer["perf_metrics"]["cached-prompt-tokens"]

    async with start_replica() as caller:
        assert [await cached(caller), await cached(caller)] == [(0, 0), (96, 96)]
        await caller.hot_load(snapshots.base(65))
        assert await cached(caller) == (0, 0)


@pytest.mark.parametrize(("reset", "found"), [(True, 0), (False, 96)])
async def test_a_hot_load_may_keep_prompts_for_weights_that_come_back(
    start_replica: Any, snapshots: Snapshots, reset: bool, found: int
) -> None:
    async with start_replica() as caller:
        await caller.complete(prompt=[*range(100)], max_tokens=2)
        await caller.hot_load(snapshots.base(65), reset_prompt_cache=reset)
        await caller.hot_load(None, reset_prompt_cache=reset)
        answer = (await caller.complete(prompt=[*range(100)], max_tokens=2)).json()
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == found


@pytest.mark.parametrize("chat", [True, False])
async def test_usage_may_come_in_a_chunk_of_its_own(start_replica: Any, chat: bool) -> None:
    async with start_replica() as caller:
        fields = {"max_tokens": 4, "n": 2, "stream": True, "ignore_eos": True}
        asked = {**fields, "stream_options": {"include_usage": True}}
        if chat:
            answered = await caller.chat(messages=[{"role": "user", "content": "hi"}], **asked)
        else:
            answered = await caller.complete(prompt=[1], **asked)
    *parts, last = answered.events()
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 8
    assert last["homefire"]["weights"]["identity"] == "base"
    assert not any("usage" in part for part in parts)
    assert all(part["choices"] for part in parts)


async def test_tokens_in_tokens_out_answers_in_vllm_s_shape(start_replica: Any) -> None:
    params = {"max_tokens": 5, "seed": 3, "logprobs": 1, "skip_special_tokens": False}
    body = {"token_ids": [97, 98], "model": "d", "sampling_params": params, "zeta": 1}
    async with start_replica() as caller:
        answered = await caller.post("/inference/v1/generate", body)
        same = await caller.complete(
            prompt=[97, 98], max_tokens=5, seed=3, logprobs=True, return_token_ids=True
        )
        events = (await caller.post("/inference/v1/generate", {**body, "stream": True})).events()
    generated, choice = answered.json(), answered.json()["choices"][0]
    expected = same.json()["choices"][0]
    entries = choice["logprobs"]["content"]
    assert answered.headers["x-homefire-ignored"] == "zeta"
    assert generated["request_id"] == answered.headers["x-request-id"]
    assert generated["prompt_token_ids"] == [97, 98]
    assert choice["token_ids"] == expected["token_ids"]
    assert choice["finish_reason"] == "length"
    assert [entry["token"] for entry in entries] == [f"token_id:{t}" for t in choice["token_ids"]]
    assert [entry["logprob"] for entry in entries] == [
        entry["logprob"] for entry in expected["logprobs"]["content"]
    ]
    streamed = [t for event in events for c in event["choices"] for t in c["token_ids"]]
    assert streamed == choice["token_ids"]


@pytest.mark.parametrize(
    ("params", "code"), [({"min_tokens": 3}, "unsupported"), ({"n": 0}, "invalid_argument")]
)
async def test_tokens_in_tokens_out_refuses_what_completions_do(
    start_replica: Any, params: Any, code: str
) -> None:
    async with start_replica() as caller:
        body = {"token_ids": [1], "sampling_params": params}
        answered = await caller.post("/inference/v1/generate", body)
    assert (answered.status, answered.json()["error"]["code"]) == (400, code)


async def test_echo_returns_the_prompt_with_its_logprobs(start_replica: Any) -> None:
    async with start_replica() as caller:
        answer = (
            await caller.complete(
                prompt=[97, 98, 99],
                max_tokens=2,
                echo=True,
                logprobs=True,
                raw_output=True,
                **GREEDY,
            )
        ).json()
    choice = answer["choices"][0]
    entries = choice["logprobs"]["content"]
    assert choice["text"].startswith("abc")
    assert choice["raw_output"]["completion_token_ids"][:3] == [97, 98, 99]
    assert len(entries) == len(choice["raw_output"]["completion_token_ids"]) == 5
    assert entries[0]["logprob"] == 0.0
    assert entries[1]["logprob"] < 0
    assert answer["usage"]["completion_tokens"] == 2


async def test_echo_last_returns_only_the_end_of_the_prompt(start_replica: Any) -> None:
    async with start_replica() as caller:
        answer = (
            await caller.complete(
                prompt="abc", max_tokens=1, echo_last=2, logprobs=True, raw_output=True, **GREEDY
            )
        ).json()
    choice = answer["choices"][0]
    assert choice["raw_output"]["completion_token_ids"][:2] == [98, 99]
    assert choice["raw_output"]["prompt_token_ids"] == [97, 98, 99]
    assert len(choice["logprobs"]["content"]) == 3
    assert choice["logprobs"]["content"][0]["logprob"] < 0


async def test_a_prompt_is_scored_without_generating(start_replica: Any) -> None:
    async with start_replica() as caller:
        fields = {"prompt": "abcd", "echo": True, "logprobs": True, **GREEDY}
        scored = (await caller.complete(max_tokens=0, **fields)).json()
        longer = (await caller.complete(max_tokens=3, **fields)).json()
    entries = scored["choices"][0]["logprobs"]["content"]
    assert scored["choices"][0]["text"] == "abcd"
    assert entries == longer["choices"][0]["logprobs"]["content"][:4]
    assert scored["usage"]["completion_tokens"] == 0


async def test_prompts_and_n_give_choices_in_order(start_replica: Any) -> None:
    async with start_replica() as caller:
        answer = (
            await caller.complete(
                prompt=["ab", "c"], n=2, max_tokens=3, seed=1, raw_output=True, ignore_eos=True
            )
        ).json()
    prompts = [choice["raw_output"]["prompt_token_ids"] for choice in answer["choices"]]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert prompts == [[97, 98], [97, 98], [99], [99]]
    assert answer["usage"]["prompt_tokens"] == 3
    assert answer["usage"]["completion_tokens"] == 12
    first, second = (
        choice["raw_output"]["completion_token_ids"] for choice in answer["choices"][:2]
    )
    assert first != second


async def test_a_stream_of_n_choices_tells_them_apart_by_index(start_replica: Any) -> None:
    async with start_replica() as caller:
        fields = {"prompt": [1], "n": 3, "max_tokens": 8, "seed": 4, "raw_output": True}
        whole = (await caller.complete(**fields)).json()
        streamed = (await caller.complete(stream=True, **fields)).events()
    for choice in whole["choices"]:
        assert text_of(streamed, choice["index"]) == choice["text"]
    finished = [c["index"] for e in streamed for c in e["choices"] if c["finish_reason"]]
    assert sorted(finished) == [0, 1, 2]
    assert ["usage" in event for event in streamed].index(True) == len(streamed) - 1


async def test_the_same_seed_answers_the_same(start_replica: Any) -> None:
    async with start_replica() as caller:
        fields = {"prompt": [1], "max_tokens": 12, "seed": 9, "return_token_ids": True}
        first, _, second = await asyncio.gather(
            caller.complete(**fields),
            caller.complete(prompt=[5], max_tokens=30, n=8),
            caller.complete(**fields),
        )
    assert first.json()["choices"] == second.json()["choices"]
    assert len(first.json()["choices"][0]["token_ids"]) == 12
    assert first.json()["choices"][0]["prompt_token_ids"] == [1]


@pytest.mark.parametrize("chat", [True, False])
async def test_penalties_and_bias_change_what_is_sampled_but_not_the_model_s_logprobs(
    start_replica: Any, snapshots: Snapshots, chat: bool
) -> None:
    """The canary's logits are 50 for its token and 0 for the others."""

    async def answer(caller: Caller, **fields: Any) -> Any:
        body = {**GREEDY, "max_tokens": 3, "logprobs": True, "return_token_ids": True, **fields}
        if chat:
            answered = await caller.chat(messages=[{"role": "user", "content": "A"}], **body)
        else:
            answered = await caller.complete(prompt=[65], **body)
        choice = answered.json()["choices"][0]
        return choice["token_ids"], choice["logprobs"]["content"]

    async with start_replica() as caller:
        await caller.hot_load(snapshots.base(65))
        plain, _ = await answer(caller)
        assert plain == [65, 65, 65]
        biased, entries = await answer(caller, logit_bias={"65": -100, "70": 1})
        assert biased == [70, 70, 70]
        assert entries[0]["logprob"] < -10
        assert entries[0]["sampling_logprob"] == 0
        penalised, _ = await answer(caller, logit_bias={"70": 49}, presence_penalty=1.5)
        assert penalised == [65, 70, 65]
        divided, _ = await answer(caller, logit_bias={"70": 44}, repetition_penalty=1.2)
        assert divided == [70, 65, 65]


async def test_a_stop_string_across_tokens_is_cut_from_the_text_but_not_from_the_tokens(
    start_replica: Any, snapshots: Snapshots
) -> None:
    async with start_replica() as caller:
        await caller.hot_load(snapshots.base(66))
        fields = {"prompt": [1], "max_tokens": 90, "stop": ["BBB"], "raw_output": True}
        whole = (await caller.complete(**fields)).json()["choices"][0]
        events = (await caller.complete(stream=True, logprobs=True, **fields)).events()
    assert whole["text"] == text_of(events) == ""
    assert whole["finish_reason"] == "stop"
    assert whole["raw_output"]["completion_token_ids"] == [66] * 3
    assert len(entries_of(events)) == 3


async def test_a_stop_token_is_among_the_tokens_and_not_in_the_text(
    start_replica: Any, snapshots: Snapshots
) -> None:
    async with start_replica() as caller:
        await caller.hot_load(snapshots.base(67))
        choice = (
            await caller.complete(prompt=[1], max_tokens=9, stop=[67], raw_output=True)
        ).json()["choices"][0]
    assert choice["text"] == ""
    assert choice["finish_reason"] == "stop"
    assert choice["raw_output"]["completion_token_ids"] == [67]


async def test_the_end_of_text_ends_a_completion(start_replica: Any, snapshots: Snapshots) -> None:
    async with start_replica() as caller:
        await caller.hot_load(snapshots.base(256))
        stopped = (await caller.complete(prompt=[1], max_tokens=5, return_token_ids=True)).json()
        ignored = (await caller.complete(prompt=[1], max_tokens=5, ignore_eos=True)).json()
    assert stopped["choices"][0]["token_ids"] == [256]
    assert stopped["choices"][0]["text"] == ""
    assert ignored["usage"]["completion_tokens"] == 5


async def test_chat_has_openai_s_shapes(start_replica: Any, snapshots: Snapshots) -> None:
    async with start_replica() as caller:
        await caller.hot_load(snapshots.base(65))
        fields = {
            "messages": [{"role": "user", "content": "hi"}],
            "max_tokens": 4,
            "logprobs": True,
            "top_logprobs": 1,
            "raw_output": True,
            "return_token_ids": True,
        }
        whole = (await caller.chat(**fields)).json()
        events = (await caller.chat(stream=True, **fields)).events()
    choice = whole["choices"][0]
    assert whole["object"] == "chat.completion"
    assert choice["message"] == {"role": "assistant", "content": "AAAA"}
    assert whole["prompt_token_ids"] == events[0]["prompt_token_ids"] == [104, 105, 257]
    assert choice["token_ids"] == [65] * 4
    assert choice["raw_output"]["prompt_token_ids"] == [104, 105, 257]
    assert choice["logprobs"]["content"][0]["top_logprobs"][0]["token"] == "A"
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    assert "".join(event["choices"][0]["delta"]["content"] for event in events) == "AAAA"
    assert events[-1]["homefire"] == whole["homefire"]


async def test_unknown_fields_are_ignored_by_name_and_the_request_id_comes_back(
    start_replica: Any,
) -> None:
    async with start_replica() as caller:
        answered = await caller.post(
            "/inference/v1/completions",
            {"prompt": [1], "max_tokens": 1, "zeta": 1, "alpha": 2},
            headers={"x-request-id": "abc123"},
        )
    assert answered.headers["x-homefire-ignored"] == "alpha,zeta"
    assert answered.headers["x-request-id"] == "abc123"
    assert answered.json()["id"] == "cmpl-abc123"


@pytest.mark.parametrize(
    ("fields", "status", "code"),
    [
        ({"prompt": []}, 400, "invalid_argument"),
        ({"prompt": [999]}, 400, "token_out_of_range"),
        ({"prompt": [1] * 2048}, 400, "sequence_too_long"),
        ({"prompt": [1], "logit_bias": {"999": 2}}, 400, "token_out_of_range"),
        ({"prompt": [1], "logit_bias": {"1": 101}}, 400, "invalid_argument"),
        ({"prompt": [1], "min_tokens": 3}, 400, "unsupported"),
        ({"prompt": {"a": 1}}, 400, "invalid_argument"),
        ({}, 400, "invalid_argument"),
        ({"prompt": [1], "model": "accounts/local/deployments/d@step-9"}, 412, "weights_mismatch"),
    ],
)
async def test_bad_requests_are_told_at_once(
    start_replica: Any, fields: Any, status: int, code: str
) -> None:
    async with start_replica() as caller:
        answered = await caller.complete(**fields)
    assert (answered.status, answered.json()["error"]["code"]) == (status, code)


async def test_a_request_may_name_the_weights_that_are_served(
    start_replica: Any, snapshots: Snapshots
) -> None:
    async with start_replica() as caller:
        base = await caller.complete(prompt=[1], max_tokens=1, model="m@base")
        await caller.hot_load(snapshots.base(65))
        loaded = await caller.complete(prompt=[1], max_tokens=1, model="m@step-65")
        named = await caller.complete(prompt=[1], max_tokens=1, model="m@step-65#d")
        old = await caller.complete(prompt=[1], max_tokens=1, model="m@base")
    assert (base.status, loaded.status, named.status, old.status) == (200, 200, 200, 412)
    assert "step-65" in old.json()["error"]["message"]
    assert old.json()["error"]["current_identity"] == "step-65"


async def test_without_the_secret_nothing_is_answered(start_replica: Any) -> None:
    async with start_replica() as caller:
        answered = await caller.call("GET", "/internal/status", secret="wrong")
    assert answered.status == 401


async def test_too_many_requests_are_shed_with_retry_after(start_replica: Any) -> None:
    async with start_replica(max_running=1, max_queued=2, max_context_length=1 << 20) as caller:
        gone = asyncio.Event()
        tasks: list[asyncio.Task[Any]] = []

        def start_endless() -> None:
            body = {"prompt": [1], "max_tokens": 1 << 19, "stream": True, "ignore_eos": True}
            path = "/inference/v1/completions"
            posting = caller.post(path, body, hang_up=lambda received: gone.is_set())
            tasks.append(asyncio.create_task(posting))

        async with asyncio.timeout(20):
            start_endless()
            while (await caller.status()).running < 1:
                await asyncio.sleep(0)
            start_endless()
            start_endless()
            while (await caller.status()).queued < 2:
                await asyncio.sleep(0)
        shed = await caller.complete(prompt=[1])
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await caller.until_idle()
    assert shed.status == 429
    assert int(shed.headers["retry-after"]) <= 60
    assert shed.json()["error"]["code"] == "overloaded"


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_goes_away_frees_its_slots(start_replica: Any, stream: bool) -> None:
    async with start_replica(max_context_length=1 << 22) as caller:
        fields = {
            "prompt": [1],
            "max_tokens": 1 << 21,
            "n": 3,
            "ignore_eos": True,
            "stream": stream,
        }
        if stream:
            answered = await caller.post(
                "/inference/v1/completions", fields, hang_up=lambda received: len(received) > 0
            )
            assert answered.status == 200
        else:
            task = asyncio.create_task(caller.complete(**fields))
            async with asyncio.timeout(20):
                while (await caller.status()).running < 3:
                    await asyncio.sleep(0)
            task.cancel()
        await caller.until_idle()
        status = await caller.status()
    assert (status.running, status.queued) == (0, 0)


async def test_an_engine_that_breaks_in_a_stream_ends_it_with_an_error(
    start_replica: Any,
) -> None:
    has_begun = threading.Event()

    def open_fragile(spec: ReplicaSpec, publish: Publish) -> InferenceEngine:
        engine: Any = open_engine(spec, publish)
        real = engine._network.decode

        def decode(*args: Any) -> Any:
            if has_begun.is_set():
                has_begun.clear()
                raise RuntimeError("the accelerator is gone")
            return real(*args)

        engine._network.decode = decode
        return engine

    def break_it(received: bytes) -> bool:
        if b"the accelerator" not in received:
            has_begun.set()
        return False

    async with start_replica(engine=open_fragile, max_context_length=1 << 22) as caller:
        answered = await caller.post(
            "/inference/v1/completions",
            {"prompt": [1], "max_tokens": 1 << 21, "stream": True, "ignore_eos": True},
            hang_up=break_it,
        )
        has_begun.clear()
        again = await caller.complete(prompt=[1], max_tokens=1)
    last = answered.body.decode().strip().split("\n\n")[-1]
    assert "the accelerator is gone" in last
    assert '"status":500' in last
    assert "[DONE]" not in answered.body.decode()
    assert again.status == 200


async def test_completions_wait_for_nothing_while_the_model_loads(start_replica: Any) -> None:
    def open_never(spec: ReplicaSpec, publish: Publish) -> InferenceEngine:
        raise OSError("no such model")

    async with start_replica(engine=open_never, wait=False) as caller:
        early = await caller.complete(prompt=[1])
        status = await caller.wait(lambda status: status.error != "")
        late = await caller.complete(prompt=[1])
    assert early.status == late.status == 503
    assert "no such model" in status.error
    assert "no such model" in late.json()["error"]["message"]
    assert not status.ready


async def test_health_proves_the_process(start_replica: Any) -> None:
    caller: Caller
    async with start_replica() as caller:
        answered = await caller.call("GET", "/internal/health")
    assert answered.json()["nonce"] == "nonce-1"
    assert answered.json()["service"] == "replica"
