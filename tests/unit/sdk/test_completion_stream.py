from __future__ import annotations

from itertools import pairwise

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from homefire.sdk import ServerMetrics, WeightsIdentity, WeightsMismatch
from homefire.sdk.completion_stream import CompletionStream, StreamError
from homefire.sdk.completions import completion_of, weights_of
from homefire.sdk.weights import check_identity


def event(**fields) -> bytes:
    return b"data: " + msgspec.json.encode(fields) + b"\n\n"


def entry(token_id: int, **fields) -> dict:
    return {"token": "x", "token_id": token_id, "logprob": -0.5, "sampling_logprob": -0.7, **fields}


def chunk(text: str, token_ids: list[int], **fields) -> bytes:
    logprobs = {"content": [entry(token) for token in token_ids]} if token_ids else None
    choice = {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": None}
    return event(id="cmpl-1", object="text_completion", choices=[{**choice, **fields}])


_LAST = event(
    id="cmpl-1",
    choices=[
        {
            "index": 0,
            "text": "",
            "logprobs": None,
            "finish_reason": "stop",
            "raw_output": {"completion_token_ids": [7, 8, 9], "completion": "héé!"},
        }
    ],
    usage={"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5},
    homefire={"weights": {"identity": "step_0-ab", "digest": "9f"}},
)
_WHOLE = chunk("hé", [7]) + chunk("é!", [8, 9]) + _LAST + b"data: [DONE]\n\n"


def joined(data: bytes) -> dict:
    stream = CompletionStream()
    stream.feed(data)
    return stream.response()


def test_a_stream_is_joined_into_one_completion():
    assert joined(_WHOLE) == {
        "id": "cmpl-1",
        "object": "text_completion",
        "usage": {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5},
        "homefire": {"weights": {"identity": "step_0-ab", "digest": "9f"}},
        "choices": [
            {
                "index": 0,
                "text": "héé!",
                "finish_reason": "stop",
                "logprobs": {"content": [entry(7), entry(8), entry(9)]},
                "raw_output": {"completion_token_ids": [7, 8, 9], "completion": "héé!"},
            }
        ],
    }


@given(cuts=st.lists(st.integers(0, 2 * len(_WHOLE)), max_size=12), crlf=st.booleans())
def test_it_does_not_matter_how_the_bytes_are_cut(cuts, crlf):
    data = _WHOLE.replace(b"\n", b"\r\n") if crlf else _WHOLE
    stream = CompletionStream()
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    for start, end in pairwise(edges):
        stream.feed(data[start:end])
    assert stream.response() == joined(_WHOLE)


def test_comments_pings_and_multi_line_events_are_understood():
    noise = b": keepalive\n\nevent: ping\n\nevent: heartbeat\ndata: {}\n\n"
    split = _LAST.replace(b"data: {", b'data: {\ndata: "z": 1,', 1)
    assert joined(noise + _WHOLE.replace(_LAST, split))["z"] == 1


def test_the_older_shape_of_logprobs_is_joined_too():
    legacy = {"tokens": ["a"], "token_logprobs": [-0.1]}
    first = chunk("a", [], logprobs=legacy)
    second = chunk("b", [], logprobs={"tokens": ["b"], "token_logprobs": [-0.2]})
    response = joined(first + second + _LAST)
    assert response["choices"][0]["logprobs"]["token_logprobs"] == [-0.1, -0.2]


@pytest.mark.parametrize(
    ("data", "status", "text"),
    [
        (event(error={"message": "engine died", "status": 503}), 503, "engine died"),
        (event(error={"message": "no", "status_code": 400}), 400, "no"),
        (event(error="broken"), None, "broken"),
        (b"event: error\n\n", None, "error event"),
        (b"data: {oops\n\n", None, "not JSON"),
    ],
)
def test_an_error_in_the_stream_is_raised_with_its_status(data, status, text):
    stream = CompletionStream()
    with pytest.raises(StreamError, match=text) as caught:
        stream.feed(chunk("a", [1]) + data)
    assert caught.value.status == status


def test_a_stream_that_ends_early_is_an_error():
    with pytest.raises(StreamError, match="without a finish_reason"):
        joined(chunk("a", [1]) + b"data: [DONE]\n\n")


def test_tokens_and_logprobs_are_aligned_one_to_one():
    completion = completion_of(joined(_WHOLE), [1, 2], weights=None)
    assert completion.full_tokens == [1, 2, 7, 8, 9]
    assert (completion.prompt_len, completion.completion_len) == (2, 3)
    assert completion.text == "héé!"
    assert completion.finish_reason == "stop"
    assert completion.inference_logprobs == [-0.5, -0.5, -0.5]
    assert completion.sampling_logprobs == [-0.7, -0.7, -0.7]
    assert not completion.logprobs_echoed
    assert completion.routing_matrices is None


def response(tokens: list[int], *, entries: list[dict] | None = None, **raw) -> dict:
    logprobs = None if entries is None else {"content": entries}
    raw_output = {"completion_token_ids": tokens, **raw}
    choice = {"text": "t", "finish_reason": "length", "logprobs": logprobs}
    return {"choices": [{**choice, "raw_output": raw_output}]}


def test_the_server_s_prompt_ids_replace_the_client_s():
    completion = completion_of(response([9], prompt_token_ids=[0, 1, 2]), [1, 2], weights=None)
    assert (completion.full_tokens, completion.prompt_len) == ([0, 1, 2, 9], 3)


def test_an_echo_covers_all_tokens_but_the_first():
    entries = [entry(i, logprob=-float(i)) for i in range(4)]
    completion = completion_of(
        response([5, 6, 7, 8], entries=entries, completion="gen"),
        [5, 6],
        weights=None,
        num_echoed=2,
    )
    assert completion.full_tokens == [5, 6, 7, 8]
    assert (completion.prompt_len, completion.completion_len) == (2, 2)
    assert completion.inference_logprobs == [-1.0, -2.0, -3.0]
    assert completion.logprobs_echoed
    assert completion.text == "gen"


def test_a_partial_echo_keeps_every_entry():
    entries = [entry(i) for i in range(3)]
    completion = completion_of(
        response([6, 7, 8], entries=entries), [4, 5, 6], weights=None, num_echoed=1
    )
    assert completion.full_tokens == [4, 5, 6, 7, 8]
    assert len(completion.inference_logprobs) == 3


@pytest.mark.parametrize(
    ("broken", "num_echoed", "text"),
    [
        ({"choices": [{"text": "t"}]}, 0, "completion_token_ids"),
        (response([1, 2], entries=[entry(1)]), 0, "1 logprobs for 2 tokens"),
        (response([9, 9, 3]), 2, "echoed tokens"),
    ],
)
def test_an_answer_that_does_not_add_up_is_an_error(broken, num_echoed, text):
    with pytest.raises(RuntimeError, match=text):
        completion_of(broken, [1, 2], weights=None, num_echoed=num_echoed)


def test_sampling_logprobs_are_absent_unless_every_token_has_one():
    entries = [entry(1), entry(2, sampling_logprob=None)]
    completion = completion_of(response([1, 2], entries=entries), [1], weights=None)
    assert completion.sampling_logprobs is None
    assert completion.inference_logprobs == [-0.5, -0.5]


def test_weights_come_from_the_final_chunk_else_from_the_header():
    header = "step_1-ab; sha=aa"
    assert weights_of(joined(_WHOLE), header) == WeightsIdentity("step_0-ab", "9f")
    assert weights_of({}, header) == WeightsIdentity("step_1-ab", "aa")
    assert weights_of({}, "base") == WeightsIdentity("base", "")
    assert weights_of({}, None) is None


@pytest.mark.parametrize("header", ["", "; sha=aa", "a b; sha=aa", "a; md5=b"])
def test_a_header_that_names_no_weights_names_none(header):
    assert WeightsIdentity.from_header(header) is None


def test_other_weights_than_expected_are_refused():
    check_identity(WeightsIdentity("step_1-ab", ""), "step_1-ab")
    check_identity(None, None)
    with pytest.raises(WeightsMismatch, match=r"'step_0-ab', not by 'step_1-ab'"):
        check_identity(WeightsIdentity("step_0-ab", ""), "step_1-ab")
    with pytest.raises(WeightsMismatch, match="does not name its weights"):
        check_identity(None, "step_1-ab")


def test_metrics_are_read_from_numbers_and_strings():
    values = {
        "prefill-queue-duration": "0.25",
        "num-concurrent-requests": 3,
        "prompt-tokens": "12",
        "cached-prompt-tokens": "4.0",
        "server-processing-time": "unknown",
    }
    assert ServerMetrics.from_values(values, 0.5) == ServerMetrics(
        num_concurrent_requests=3,
        prefill_queue_duration=0.25,
        prompt_tokens=12,
        cached_prompt_tokens=4,
        client_ttft=0.5,
    )


def test_metrics_are_read_from_headers_with_and_without_prefix():
    headers = {"Fireworks-Prefill-Queue-Duration": "0.5", "server-time-to-first-token": "0.1"}
    assert ServerMetrics.from_headers(headers) == ServerMetrics(
        prefill_queue_duration=0.5, server_ttft=0.1
    )
