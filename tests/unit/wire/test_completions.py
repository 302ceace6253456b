from __future__ import annotations

import msgspec
import pytest

from homefire.wire.completions import (
    REFUSED_UNLESS,
    ChatCompletionRequest,
    Completion,
    CompletionChoice,
    CompletionRequest,
    Logprobs,
    TokenLogprob,
    unknown_fields,
)
from homefire.wire.errors import Unsupported


@pytest.mark.parametrize("prompt", ["text", [1, 2], ["a", "b"], [[1], [2, 3]]])
def test_a_prompt_comes_in_four_forms(prompt: object) -> None:
    body = msgspec.json.encode({"prompt": prompt})
    assert msgspec.json.decode(body, type=CompletionRequest).prompt == prompt


def test_true_and_one_are_different_kinds_of_logprobs() -> None:
    true = msgspec.json.decode(b'{"prompt": "x", "logprobs": true}', type=CompletionRequest)
    one = msgspec.json.decode(b'{"prompt": "x", "logprobs": 1}', type=CompletionRequest)
    assert true.logprobs is True
    assert one.logprobs is not True
    assert one.logprobs == 1


def test_unknown_fields_are_named_in_order() -> None:
    body = b'{"prompt": "x", "zebra": 1, "apple": {"deep": [1]}, "user": "u"}'
    assert unknown_fields(body, CompletionRequest) == ["apple", "zebra"]


def test_a_field_of_the_other_kind_of_request_is_unknown() -> None:
    assert unknown_fields(b'{"messages": [], "prompt": "x"}', ChatCompletionRequest) == ["prompt"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("length_penalty", 0.5),
        ("min_tokens", 3),
        ("include_routing_matrix", True),
        ("mirostat_target", 3),
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(field: str, value: object) -> None:
    body = msgspec.json.encode({"prompt": "x", field: value})
    with pytest.raises(Unsupported, match=field) as refusal:
        unknown_fields(body, CompletionRequest)
    assert refusal.value.field == field


def test_refused_fields_may_be_null_or_switched_off() -> None:
    off = {name: (values[0] if values else None) for name, values in REFUSED_UNLESS.items()}
    for body in ({"prompt": "x", **off}, {"prompt": "x", **dict.fromkeys(REFUSED_UNLESS)}):
        assert unknown_fields(msgspec.json.encode(body), CompletionRequest) == []


def test_a_chunk_says_null_where_clients_look_and_nothing_where_they_do_not() -> None:
    chunk = Completion(
        id="cmpl-1", created=1, model="m@base", choices=[CompletionChoice(index=0, text="a")]
    )
    assert msgspec.json.decode(msgspec.json.encode(chunk)) == {
        "id": "cmpl-1",
        "object": "text_completion",
        "created": 1,
        "model": "m@base",
        "choices": [{"index": 0, "text": "a", "logprobs": None, "finish_reason": None}],
    }


@pytest.mark.parametrize(
    "logprobs",
    [
        Logprobs(content=[TokenLogprob("a", 97, -0.5, -0.25, [97], 0)]),
        Logprobs(tokens=["a"], token_ids=[97], token_logprobs=[None], text_offset=[0]),
    ],
    ids=["content", "lists"],
)
def test_both_shapes_of_logprobs_come_back_as_they_went(logprobs: Logprobs) -> None:
    choice = CompletionChoice(index=0, text="a", logprobs=logprobs)
    assert msgspec.json.decode(msgspec.json.encode(choice), type=CompletionChoice) == choice
