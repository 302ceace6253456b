"""Completions and chat completions: what inference clients send, and what they get back.

The shapes are fireworks.md §5.2 and OpenAI's, so that the Fireworks sampler, `openai` and plain curl read
the same answers. `logprobs` chooses its own shape by its type, as Fireworks does: `true` answers
`{"content": [one entry per token]}`, an integer the older `{"tokens", "token_logprobs", …}`.

Beside the protocol every answer carries `homefire.weights`, the identity and digest of the weights that
made it: in a stream in the final chunk of the response. Where the weights changed in place meanwhile,
`homefire.spans` says which tokens each version drew, and each chunk's `model` names its own.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from homefire.wire.errors import Unsupported

IGNORED_HEADER = "x-homefire-ignored"
"""Names the request's fields that this server does not know, separated by commas."""


class FinishReason(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"
    """An end-of-sequence token, a stop token or a stop string."""
    LENGTH = "length"
    """`max_tokens`, or the end of the context."""


class StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool = False
    """Usage comes in a chunk of its own, without choices; else with the final choice."""


class _Sampled(msgspec.Struct, frozen=True, kw_only=True):
    """What both kinds of request have. Null means the default."""

    model: str = ""
    expect_identity: str | None = None
    """Only these weights may answer, from the first token to the last; as `model` does after its `@`."""
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    """Null is 1; 0 is greedy."""
    top_p: float | None = None
    top_k: int | None = None
    """0 and -1 mean no truncation."""
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    """Both over the tokens generated so far."""
    repetition_penalty: float | None = None
    """Over the prompt too. Null and 1 are off."""
    logit_bias: dict[str, float] | None = None
    """By token id, as JSON has keys: `{"53": -100}`."""
    n: int | None = None
    best_of: int | None = None
    """Must be `n`: every choice is returned."""
    seed: int | None = None
    stop: str | list[str | int] | None = None
    """Strings, or token ids."""
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    add_special_tokens: bool | None = None
    """Of a prompt given as text. Null: yes for a completion, no for a chat, whose template has them."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | int | None = None
    top_logprobs: int | None = None
    echo: bool | None = None
    echo_last: int | None = None
    """Only the last so many tokens of the prompt are echoed."""
    raw_output: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    """Logprobs call tokens `token_id:53` instead of by their text, which two tokens may share."""
    perf_metrics_in_response: bool | None = None
    user: str | None = None
    """A hint for the gateway's routing; no effect in a replica. So is the next."""
    prompt_cache_key: str | None = None


class CompletionRequest(_Sampled, frozen=True, kw_only=True):
    """Example: `{"model": "accounts/local/deployments/d", "prompt": [53, 62], "max_tokens": 6}`."""

    prompt: str | list[int | str | list[int]]
    """Text, token ids, or several of one kind: each of several prompts gets its own choices."""


ChatMessage = dict[str, Any]
"""`role`, `content`, and whatever else the model's template may read, e.g. `tool_calls`."""


class ChatCompletionRequest(_Sampled, frozen=True, kw_only=True):
    messages: list[ChatMessage]
    tools: list[dict[str, Any]] | None = None
    """Given to the template. Calls stay in the text of the answer: they are not parsed."""
    tool_choice: str | dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables of the template, e.g. `{"enable_thinking": false}`."""
    reasoning_effort: str | None = None
    """One such variable."""


class GenerateRequest(msgspec.Struct, frozen=True, kw_only=True):
    """vLLM's tokens in, tokens out: `{"model", "token_ids", "sampling_params": {"max_tokens": 6}}`."""

    model: str = ""
    expect_identity: str | None = None
    token_ids: list[int]
    sampling_params: dict[str, Any] = {}
    """The same names as in a completion. `logprobs` counts alternatives."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    """Accepted; the ids always come back."""
    cache_salt: str | None = None
    """Accepted; a hint. So is the next."""
    priority: int | None = None


_NO_TEXT_IN_GENERATE = frozenset({"skip_special_tokens", "detokenize"})
"""Of `sampling_params`: they shape text, and there is none."""
_NO_EXPERTS_IN_GENERATE = frozenset({"routed_experts_prompt_start"})
"""Where routing would begin to be returned; none is."""


def as_completion(request: GenerateRequest) -> dict[str, Any]:
    """The completion request that means the same: its tokens named by id, with their logprobs."""
    params = {
        name: value
        for name, value in request.sampling_params.items()
        if name not in _NO_TEXT_IN_GENERATE | _NO_EXPERTS_IN_GENERATE
    }
    num_alternatives = params.pop("logprobs", None)
    return {
        **params,
        "model": request.model,
        "expect_identity": request.expect_identity,
        "prompt": request.token_ids,
        "logprobs": num_alternatives is not None,
        "top_logprobs": num_alternatives,
        "stream": request.stream,
        "stream_options": request.stream_options,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }


REFUSED_UNLESS: dict[str, tuple[Any, ...]] = {
    # What is drawn.
    "length_penalty": (1,),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "min_tokens": (0,),
    "typical_p": (1,),
    "mirostat_target": (),
    "use_beam_search": (False,),
    "logits_processors": ([],),
    "thinking_token_budget": (),
    # What shape it must have.
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "grammar": (),
    # What is asked.
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "documents": ([],),
    "chat_template": (),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "truncate_prompt_tokens": (),
    "prompt_truncate_len": (),
    "prompt_embeds": (),
    "images": ([],),
    "features": (),
    "content_parts": ([],),
    "audio": (),
    "modalities": (["text"],),
    "web_search_options": (),
    "context_length_exceeded_behavior": ("truncate",),
    # What comes back.
    "skip_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "prompt_logprobs": (),
    "logprob_token_ids": (),
    "include_routing_matrix": (False,),
    "sampling_mask": (False,),
    "top_sampling_logprobs": (0,),
}
"""Fields that would change the answer and that this version cannot honour, of a request that does not
have them: refused by name unless null or one of these values, which mean "off". Every other unknown
field is ignored and named."""


def unknown_fields(body: bytes, kind: type[msgspec.Struct]) -> list[str]:
    """The fields of a valid JSON `body` that `kind` does not have; refuses those that must not be
    ignored. Raises Unsupported."""
    fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    unknown = sorted(fields.keys() - _field_names(kind))
    for name in unknown:
        if name in REFUSED_UNLESS:
            _refuse_unless_off(name, msgspec.json.decode(fields[name]))
    return [name for name in unknown if name not in REFUSED_UNLESS]


def _field_names(kind: type[msgspec.Struct]) -> frozenset[str]:
    return _FIELDS.setdefault(kind, frozenset(kind.__struct_fields__))


_FIELDS: dict[type[msgspec.Struct], frozenset[str]] = {}


def _refuse_unless_off(name: str, value: Any) -> None:
    if value is not None and value not in REFUSED_UNLESS[name]:
        raise Unsupported(
            f"{name} is not supported by this version", hint=f"leave {name} out", field=name
        )


# Answers -------------------------------------------------------------------------------------


class TopLogprob(msgspec.Struct, frozen=True):
    token: str
    token_id: int
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct, frozen=True):
    """One returned token; of an echoed prompt too."""

    token: str
    token_id: int
    logprob: float
    """Under the model: temperature 1, nothing cut off. 0 for a prompt's first token, which has none."""
    sampling_logprob: float
    """Under the distribution it was drawn from; an echoed token's is its `logprob`."""
    bytes: list[int]
    text_offset: int
    """Characters of this choice's text before the token."""
    top_logprobs: list[TopLogprob] = []


class Logprobs(msgspec.Struct, frozen=True, kw_only=True):
    """In one of two shapes: `content` alone answers `logprobs: true`, the lists an integer."""

    content: list[TokenLogprob] | UnsetType = UNSET
    tokens: list[str] | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET
    token_logprobs: list[float | None] | UnsetType = UNSET
    """Null for a prompt's first token."""
    top_logprobs: list[dict[str, float] | None] | UnsetType = UNSET
    text_offset: list[int] | UnsetType = UNSET


class RawOutput(msgspec.Struct, frozen=True):
    """What the model saw and made, in tokens. With `echo` the echoed ones lead the completion's."""

    completion_token_ids: list[int]
    prompt_token_ids: list[int]
    completion: str
    prompt_fragments: list[str | int] = []


class CompletionChoice(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    text: str
    logprobs: Logprobs | None = None
    finish_reason: FinishReason | None = None
    raw_output: RawOutput | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class PromptTokensDetails(msgspec.Struct, frozen=True):
    cached_tokens: int


class Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class WeightsInfo(msgspec.Struct, frozen=True):
    """Example: `WeightsInfo("step_00010-4b50536f", "9f86d081884c7d65…")`; identity `base` before any."""

    identity: str
    digest: str


class WeightsSpan(msgspec.Struct, frozen=True):
    """Tokens `start` to before `end` of a choice's completion, drawn by one version of the weights."""

    start: int
    end: int
    identity: str
    digest: str


class HomefireInfo(msgspec.Struct, frozen=True):
    weights: WeightsInfo
    """That the answer began with."""
    spans: list[list[WeightsSpan]] | UnsetType = UNSET
    """Per choice, without a gap; only where weights changed in place while it ran. Without it every
    token is of `weights`."""


PerfMetrics = dict[str, float | int]
"""Seconds and counts, by fireworks.md §5.4's names without prefix."""


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """A whole answer, and, with partial choices, a chunk of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType = UNSET
    perf_metrics: PerfMetrics | UnsetType = UNSET
    homefire: HomefireInfo | UnsetType = UNSET


class AssistantMessage(msgspec.Struct, frozen=True):
    content: str
    role: Literal["assistant"] = "assistant"


class ChatChoice(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    message: AssistantMessage
    logprobs: Logprobs | None = None
    finish_reason: FinishReason | None = None
    raw_output: RawOutput | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    prompt_token_ids: list[int] | UnsetType = UNSET
    """Where vLLM has them: all choices of a chat have one prompt."""
    usage: Usage | UnsetType = UNSET
    perf_metrics: PerfMetrics | UnsetType = UNSET
    homefire: HomefireInfo | UnsetType = UNSET


class ChatDelta(msgspec.Struct, frozen=True):
    content: str
    role: Literal["assistant"] | UnsetType = UNSET
    """In the first chunk of a choice."""


class ChatChunkChoice(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    delta: ChatDelta
    logprobs: Logprobs | None = None
    finish_reason: FinishReason | None = None
    raw_output: RawOutput | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class ChatCompletionChunk(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    prompt_token_ids: list[int] | UnsetType = UNSET
    usage: Usage | UnsetType = UNSET
    perf_metrics: PerfMetrics | UnsetType = UNSET
    homefire: HomefireInfo | UnsetType = UNSET


class GeneratedChoice(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    token_ids: list[int]
    logprobs: Logprobs | None = None
    finish_reason: FinishReason | None = None


class Generated(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to a GenerateRequest, in vLLM's shape; a chunk of it in a stream."""

    request_id: str
    model: str
    choices: list[GeneratedChoice]
    prompt_token_ids: list[int] | UnsetType = UNSET
    usage: Usage | UnsetType = UNSET
    homefire: HomefireInfo | UnsetType = UNSET


class ErrorChunk(msgspec.Struct, frozen=True):
    """Ends a stream that broke: `error` is the detail of `errors.error_body` plus `status`."""

    error: dict[str, Any]
