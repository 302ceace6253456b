from __future__ import annotations

from typing import Any

import msgspec
import pytest

from homefire.inference.replica.order import ModelLimits, Order, order_chat, order_completion
from homefire.inference.replica.tokenizer import ModelTokenizer
from homefire.inference.replica.transcript import LogprobStyle
from homefire.wire.completions import ChatCompletionRequest, CompletionRequest
from homefire.wire.errors import InvalidArgument, SequenceTooLong, TokenOutOfRange, Unsupported

LIMITS = ModelLimits(vocab_size=320, max_context_length=32)


@pytest.fixture
def order(tokenizer: ModelTokenizer) -> Any:
    def make(**fields: Any) -> Order:
        body = msgspec.json.encode({"prompt": [1, 2, 3], **fields})
        request = msgspec.json.decode(body, type=CompletionRequest)
        return order_completion(request, tokenizer, LIMITS)

    return make


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("ab", [[97, 98]]),
        ([97, 98], [[97, 98]]),
        (["a", "bc"], [[97], [98, 99]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_every_form_of_a_prompt_becomes_tokens(order: Any, prompt: Any, prompts: Any) -> None:
    assert order(prompt=prompt).prompts == prompts


@pytest.mark.parametrize(
    ("fields", "error", "field"),
    [
        ({"prompt": []}, InvalidArgument, "prompt"),
        ({"prompt": ""}, InvalidArgument, "prompt"),
        ({"prompt": [[1], []]}, InvalidArgument, "prompt"),
        ({"prompt": [1, "a"]}, InvalidArgument, "prompt"),
        ({"prompt": [1, 320]}, TokenOutOfRange, "prompt"),
        ({"prompt": [-1]}, TokenOutOfRange, "prompt"),
        ({"prompt": [1] * 32}, SequenceTooLong, "prompt"),
        ({"prompt": [1] * 33, "max_tokens": 0}, SequenceTooLong, "prompt"),
        ({"max_tokens": -1}, InvalidArgument, "max_tokens"),
        (
            {"max_tokens": 1, "max_completion_tokens": 2},
            InvalidArgument,
            "max_completion_tokens",
        ),
        ({"best_of": 3, "n": 2}, Unsupported, "best_of"),
        ({"best_of": 1, "n": 2}, InvalidArgument, "best_of"),
        ({"temperature": -0.1}, InvalidArgument, "temperature"),
        ({"top_p": 0}, InvalidArgument, "top_p"),
        ({"top_p": 1.5}, InvalidArgument, "top_p"),
        ({"top_k": -2}, InvalidArgument, "top_k"),
        ({"min_p": 2}, InvalidArgument, "min_p"),
        ({"presence_penalty": 2.1}, InvalidArgument, "presence_penalty"),
        ({"frequency_penalty": -3}, InvalidArgument, "frequency_penalty"),
        ({"repetition_penalty": 0}, InvalidArgument, "repetition_penalty"),
        ({"logit_bias": {"5": 101}}, InvalidArgument, "logit_bias"),
        ({"logit_bias": {"x": 1}}, InvalidArgument, "logit_bias"),
        ({"logit_bias": {"320": 1}}, TokenOutOfRange, "logit_bias"),
        ({"n": 0}, InvalidArgument, "n"),
        ({"n": 300, "prompt": [[1], [2]]}, InvalidArgument, "n"),
        ({"logprobs": 21}, InvalidArgument, "logprobs"),
        ({"top_logprobs": 21}, InvalidArgument, "top_logprobs"),
        ({"stop": ""}, InvalidArgument, "stop"),
        ({"stop": ["x"] * 17}, InvalidArgument, "stop"),
        ({"stop": [999]}, TokenOutOfRange, "stop"),
        ({"echo_last": -1}, InvalidArgument, "echo_last"),
    ],
)
def test_what_is_wrong_is_named(order: Any, fields: Any, error: Any, field: str) -> None:
    with pytest.raises(error) as refusal:
        order(**fields)
    assert type(refusal.value) is error
    assert refusal.value.field == field


def test_null_means_the_default(order: Any) -> None:
    names = [
        "max_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "n",
        "seed",
        "stop",
        "logprobs",
        "echo",
        "raw_output",
    ]
    assert order(**dict.fromkeys(names)) == order()


def test_max_tokens_end_with_the_context(order: Any, tokenizer: ModelTokenizer) -> None:
    sequences = order(max_tokens=1000).sequences(tokenizer, LIMITS)
    assert [sequence.max_new_tokens for sequence in sequences] == [29]


def test_a_chat_may_fill_the_context(tokenizer: ModelTokenizer) -> None:
    request = msgspec.json.decode(b'{"messages": []}', type=ChatCompletionRequest)
    (sequence,) = order_chat(request, "hi<|answer|>", tokenizer, LIMITS).sequences(
        tokenizer, LIMITS
    )
    assert sequence.prompt == (104, 105, 257)
    assert sequence.max_new_tokens == 29


def test_top_k_zero_and_minus_one_mean_off(order: Any) -> None:
    assert order(top_k=0).sampling == order(top_k=-1).sampling == order().sampling


def test_stop_takes_strings_and_ids_and_the_end_of_text_unless_ignored(order: Any) -> None:
    both = order(stop=["x", 7], stop_token_ids=[8])
    assert both.stops == ("x",)
    assert both.stop_token_ids == {7, 8, 256}
    assert order(ignore_eos=True).stop_token_ids == set()


@pytest.mark.parametrize(
    ("fields", "style", "tops"),
    [
        ({}, LogprobStyle.NONE, 0),
        ({"logprobs": False, "top_logprobs": 3}, LogprobStyle.NONE, 0),
        ({"logprobs": True}, LogprobStyle.CONTENT, 0),
        ({"logprobs": True, "top_logprobs": 3}, LogprobStyle.CONTENT, 3),
        ({"top_logprobs": 3}, LogprobStyle.CONTENT, 3),
        ({"logprobs": 0}, LogprobStyle.LEGACY, 0),
        ({"logprobs": 2}, LogprobStyle.LEGACY, 2),
    ],
)
def test_the_type_of_logprobs_chooses_their_shape(
    order: Any, fields: Any, style: LogprobStyle, tops: int
) -> None:
    assert (order(**fields).style, order(**fields).num_alternatives) == (style, tops)


def test_choices_of_a_seeded_request_draw_differently_and_the_first_as_if_alone(
    order: Any, tokenizer: ModelTokenizer
) -> None:
    alone = order(seed=5).sequences(tokenizer, LIMITS)
    several = order(seed=5, n=3).sequences(tokenizer, LIMITS)
    assert several[0].seed == alone[0].seed
    assert len({sequence.seed for sequence in several}) == 3


def test_only_echoed_tokens_are_scored(order: Any, tokenizer: ModelTokenizer) -> None:
    def scored_from(**fields: Any) -> int | None:
        scoring = order(**fields).sequences(tokenizer, LIMITS)[0].scoring
        return scoring and scoring.logprobs_from

    assert scored_from(echo=True) is None
    assert scored_from(logprobs=True) is None
    assert scored_from(echo=True, logprobs=True) == 0
    assert scored_from(echo_last=2, logprobs=True) == 1
    assert scored_from(echo_last=99, logprobs=True) == 0


def test_the_name_of_a_special_token_stops_at_that_token(order: Any) -> None:
    asked = order(stop=["<|answer|>", "END"], ignore_eos=True)
    assert asked.stops == ("END",)
    assert asked.stop_token_ids == {257}


def test_as_many_choices_as_wanted_are_the_best_of_themselves(order: Any) -> None:
    assert order(best_of=2, n=2).num_choices == 2


def test_an_overlong_prompt_is_told_in_the_words_that_clients_look_for(order: Any) -> None:
    """`verifiers` ends a rollout cleanly when it reads them, and fails it otherwise."""
    with pytest.raises(SequenceTooLong, match="this model's maximum context length is 32"):
        order(prompt=[1] * 40)
