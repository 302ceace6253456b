"""A request, checked whole and spelled out: what to generate, and what of it to answer with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from homefire.inference.engine.protocol import PromptScoring, Sampling, SequenceRequest
from homefire.inference.replica.stop_text import StopOnText
from homefire.inference.replica.tokenizer import ModelTokenizer, token_id_name
from homefire.inference.replica.transcript import LogprobStyle, Transcript
from homefire.wire.completions import ChatCompletionRequest, CompletionRequest
from homefire.wire.errors import InvalidArgument, SequenceTooLong, TokenOutOfRange, Unsupported

DEFAULT_MAX_TOKENS = 16
"""OpenAI's for completions; a chat may fill the context."""
MAX_CHOICES = 512
MAX_TOP_LOGPROBS = 20
MAX_STOPS = 16
MAX_STOP_CHARACTERS = 1024
MAX_LOGIT_BIAS = 100.0
"""OpenAI's: this much decides."""
MAX_REPETITION_PENALTY = 10.0
_NEXT_CHOICE = 1 << 64
"""Between the seeds of one request's choices: choice 0 has the request's own."""


Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class ModelLimits:
    vocab_size: int
    max_context_length: int


@dataclass(frozen=True)
class Order:
    """`n` choices for each prompt: choice i belongs to prompt i // n."""

    prompts: list[list[int]]
    n: int
    max_tokens: int
    sampling: Sampling
    seed: int | None
    stops: tuple[str, ...]
    stop_token_ids: frozenset[int]
    style: LogprobStyle
    num_alternatives: int
    num_echoed: int
    """Prompt tokens to return, from the end; 0 for none."""
    is_streamed: bool
    wants_raw_output: bool
    wants_token_ids: bool
    names_tokens_by_id: bool
    has_usage_apart: bool
    """In a stream: usage in a chunk of its own."""
    wants_perf_metrics: bool

    @property
    def num_choices(self) -> int:
        return len(self.prompts) * self.n

    def prompt_of(self, choice: int) -> list[int]:
        return self.prompts[choice // self.n]

    def echoed(self, choice: int) -> list[int]:
        """The prompt tokens that lead this choice's tokens."""
        prompt = self.prompt_of(choice)
        return prompt[max(0, len(prompt) - self.num_echoed) :]

    def sequences(self, tokenizer: ModelTokenizer, limits: ModelLimits) -> list[SequenceRequest]:
        """The choices of one prompt share its tokens."""
        prompts = [tuple(prompt) for prompt in self.prompts]
        return [
            self._sequence(choice, prompts[choice // self.n], tokenizer, limits)
            for choice in range(self.num_choices)
        ]

    def transcript(self, choice: int, tokenizer: ModelTokenizer) -> Transcript:
        prompt = self.prompt_of(choice)
        return Transcript(
            tokenizer,
            after=prompt[: len(prompt) - len(self.echoed(choice))],
            stops=self.stops,
            stop_token_ids=self.stop_token_ids,
            style=self.style,
            name_of=self._token_names(tokenizer),
        )

    def _token_names(self, tokenizer: ModelTokenizer) -> Callable[[int], str]:
        """How logprobs call a token."""
        if self.names_tokens_by_id:
            return token_id_name
        return tokenizer.token_name if self.style is LogprobStyle.LEGACY else tokenizer.token_text

    def _sequence(
        self,
        choice: int,
        prompt: tuple[int, ...],
        tokenizer: ModelTokenizer,
        limits: ModelLimits,
    ) -> SequenceRequest:
        wants_scores = self.num_echoed > 0 and self.style is not LogprobStyle.NONE
        return SequenceRequest(
            prompt=prompt,
            max_new_tokens=min(self.max_tokens, limits.max_context_length - len(prompt)),
            sampling=self.sampling,
            seed=None if self.seed is None else abs(self.seed) + choice * _NEXT_CHOICE,
            stop_token_ids=self.stop_token_ids,
            stop=StopOnText(tokenizer, self.stops, after=prompt) if self.stops else None,
            num_alternatives=self.num_alternatives,
            scoring=PromptScoring(len(prompt) - len(self.echoed(choice)), self.num_alternatives)
            if wants_scores
            else None,
        )


def order_completion(
    request: CompletionRequest, tokenizer: ModelTokenizer, limits: ModelLimits
) -> Order:
    special = request.add_special_tokens is not False
    prompts = prompt_tokens(request.prompt, tokenizer, add_special_tokens=special)
    return _order(request, prompts, tokenizer, limits, default_max_tokens=DEFAULT_MAX_TOKENS)


def order_chat(
    request: ChatCompletionRequest, text: str, tokenizer: ModelTokenizer, limits: ModelLimits
) -> Order:
    """`text` is the rendered chat, which holds its special tokens already."""
    prompts = [tokenizer.encode(text, add_special_tokens=bool(request.add_special_tokens))]
    return _order(request, prompts, tokenizer, limits, default_max_tokens=limits.max_context_length)


def prompt_tokens(
    prompt: str | Sequence[int | str | list[int]],
    tokenizer: ModelTokenizer,
    *,
    add_special_tokens: bool,
) -> list[list[int]]:
    """One list of ids per prompt, whichever of the four forms it came in."""
    if isinstance(prompt, str):
        return [tokenizer.encode(prompt, add_special_tokens=add_special_tokens)]
    ids = [item for item in prompt if isinstance(item, int)]
    if ids and len(ids) == len(prompt):
        return [ids]
    if ids:
        raise InvalidArgument(
            "the prompt mixes token ids with texts or lists",
            hint="send one list of ids, or a list of prompts",
            field="prompt",
        )
    return [
        tokenizer.encode(item, add_special_tokens=add_special_tokens)
        if isinstance(item, str)
        else item
        for item in prompt
        if not isinstance(item, int)
    ]


def _order(
    request: CompletionRequest | ChatCompletionRequest,
    prompts: list[list[int]],
    tokenizer: ModelTokenizer,
    limits: ModelLimits,
    *,
    default_max_tokens: int,
) -> Order:
    n = _within("n", request.n, 1, 1, MAX_CHOICES)
    _check_best_of(request.best_of, n)
    max_tokens = _max_tokens(request, default_max_tokens)
    _check_prompts(prompts, n, limits, needs_room=max_tokens > 0)
    style, num_alternatives = _logprobs(request)
    stops, stop_token_ids = _stops(request, tokenizer, limits)
    return Order(
        prompts=prompts,
        n=n,
        max_tokens=max_tokens,
        sampling=_sampling(request, limits),
        seed=request.seed,
        stops=stops,
        stop_token_ids=stop_token_ids
        | (frozenset() if request.ignore_eos else tokenizer.eos_token_ids),
        style=style,
        num_alternatives=num_alternatives,
        num_echoed=_num_echoed(request, prompts),
        is_streamed=bool(request.stream),
        wants_raw_output=bool(request.raw_output),
        wants_token_ids=bool(request.return_token_ids),
        names_tokens_by_id=bool(request.return_tokens_as_token_ids),
        has_usage_apart=request.stream_options is not None and request.stream_options.include_usage,
        wants_perf_metrics=bool(request.perf_metrics_in_response),
    )


def _check_best_of(best_of: int | None, n: int) -> None:
    if best_of is None or best_of == n:
        return
    if best_of < n:
        raise InvalidArgument(
            f"best_of is {best_of} and n is {n}", hint="leave best_of out", field="best_of"
        )
    raise Unsupported(
        f"best_of {best_of} of n {n}: choosing among choices is not supported by this version",
        hint="ask for n choices with logprobs, and choose",
        field="best_of",
    )


def _max_tokens(request: CompletionRequest | ChatCompletionRequest, default: int) -> int:
    given, newer = request.max_tokens, request.max_completion_tokens
    if given is not None and newer is not None and given != newer:
        raise InvalidArgument(
            f"max_tokens is {given} and max_completion_tokens is {newer}",
            hint="they mean the same; send one",
            field="max_completion_tokens",
        )
    given = newer if given is None else given
    if given is not None and given < 0:
        raise InvalidArgument(f"max_tokens is {given}", hint="use 0 or more", field="max_tokens")
    return default if given is None else given


def _check_prompts(
    prompts: list[list[int]], n: int, limits: ModelLimits, *, needs_room: bool
) -> None:
    if not prompts:
        raise InvalidArgument("there is no prompt", hint="send at least one", field="prompt")
    if len(prompts) * n > MAX_CHOICES:
        raise InvalidArgument(
            f"{len(prompts)} prompts with n={n} are more than {MAX_CHOICES} choices",
            hint="send several requests",
            field="n",
        )
    for prompt in prompts:
        _check_prompt(prompt, limits, needs_room=needs_room)


def _check_prompt(prompt: list[int], limits: ModelLimits, *, needs_room: bool) -> None:
    if not prompt:
        raise InvalidArgument("the prompt is empty", hint="send at least one token", field="prompt")
    if len(prompt) + needs_room > limits.max_context_length:
        raise SequenceTooLong(
            # Clients tell an overlong prompt by these words, which are vLLM's.
            f"the prompt has {len(prompt)} tokens, but this model's maximum context length is"
            f" {limits.max_context_length}",
            hint="shorten the prompt" + (", leaving room for a new token" if needs_room else ""),
            field="prompt",
        )
    _check_tokens(prompt, limits, field="prompt")


def _check_tokens(tokens: Sequence[int], limits: ModelLimits, *, field: str) -> None:
    if not tokens or (min(tokens) >= 0 and max(tokens) < limits.vocab_size):
        return
    wrong = next(token for token in tokens if not 0 <= token < limits.vocab_size)
    raise TokenOutOfRange(
        f"{field} has token {wrong}, the vocabulary ends at {limits.vocab_size - 1}",
        hint="encode with this model's tokenizer",
        field=field,
    )


def _logprobs(request: CompletionRequest | ChatCompletionRequest) -> tuple[LogprobStyle, int]:
    """`true` (or `top_logprobs` alone) asks for entries per token, an integer for the older lists."""
    tops = _within("top_logprobs", request.top_logprobs, 0, 0, MAX_TOP_LOGPROBS)
    asked = request.logprobs
    if isinstance(asked, bool) or asked is None:
        is_wanted = asked or (asked is None and tops > 0)
        return (LogprobStyle.CONTENT, tops) if is_wanted else (LogprobStyle.NONE, 0)
    return LogprobStyle.LEGACY, max(tops, _within("logprobs", asked, 0, 0, MAX_TOP_LOGPROBS))


def _stops(
    request: CompletionRequest | ChatCompletionRequest,
    tokenizer: ModelTokenizer,
    limits: ModelLimits,
) -> tuple[tuple[str, ...], frozenset[int]]:
    """A special token has no text to be found in, so its name in `stop` is its id."""
    given = [request.stop] if isinstance(request.stop, str) else request.stop or []
    texts = tuple(item for item in given if isinstance(item, str))
    ids = [item for item in given if isinstance(item, int)] + (request.stop_token_ids or [])
    _check_tokens(ids, limits, field="stop")
    if "" in texts or len(given) > MAX_STOPS or any(len(t) > MAX_STOP_CHARACTERS for t in texts):
        raise InvalidArgument(
            "stop has an empty, too long or too many strings",
            hint=f"send up to {MAX_STOPS}, of 1 to {MAX_STOP_CHARACTERS} characters",
            field="stop",
        )
    special = {text: found for text in texts if (found := tokenizer.special_id(text)) is not None}
    return tuple(t for t in texts if t not in special), frozenset([*ids, *special.values()])


def _sampling(request: CompletionRequest | ChatCompletionRequest, limits: ModelLimits) -> Sampling:
    top_k = _within("top_k", request.top_k, 0, -1, 1 << 31)
    top_p = _within("top_p", request.top_p, 1.0, 0.0, 1.0)
    if top_p == 0:
        raise InvalidArgument("top_p is 0", hint="use more than 0 and up to 1", field="top_p")
    repetition = _within(
        "repetition_penalty", request.repetition_penalty, 1.0, 0.0, MAX_REPETITION_PENALTY
    )
    if repetition == 0:
        raise InvalidArgument(
            "repetition_penalty is 0",
            hint="use more than 0; 1 is off",
            field="repetition_penalty",
        )
    return Sampling(
        temperature=_within("temperature", request.temperature, 1.0, 0.0, 100.0),
        top_p=top_p,
        top_k=max(top_k, 0),
        min_p=_within("min_p", request.min_p, 0.0, 0.0, 1.0),
        presence_penalty=_within("presence_penalty", request.presence_penalty, 0.0, -2.0, 2.0),
        frequency_penalty=_within("frequency_penalty", request.frequency_penalty, 0.0, -2.0, 2.0),
        repetition_penalty=repetition,
        logit_bias=_logit_bias(request.logit_bias or {}, limits),
    )


def _logit_bias(given: dict[str, float], limits: ModelLimits) -> tuple[tuple[int, float], ...]:
    biases: dict[int, float] = {}
    for key, bias in given.items():
        if not key.isdecimal():
            raise InvalidArgument(
                f"logit_bias names the token {key!r}",
                hint='name tokens by their ids, e.g. {"53": -100}',
                field="logit_bias",
            )
        biases[int(key)] = _within("logit_bias", bias, 0.0, -MAX_LOGIT_BIAS, MAX_LOGIT_BIAS)
    _check_tokens(list(biases), limits, field="logit_bias")
    return tuple(biases.items())


def _num_echoed(
    request: CompletionRequest | ChatCompletionRequest, prompts: list[list[int]]
) -> int:
    longest = max(map(len, prompts))
    if request.echo_last is not None:
        return _within("echo_last", request.echo_last, 0, 0, 1 << 31)
    return longest if request.echo else 0


def _within(
    field: str, value: Number | None, default: Number, lowest: Number, highest: Number
) -> Number:
    if value is None:
        return default
    if not lowest <= value <= highest:
        raise InvalidArgument(f"{field} is {value}", hint=f"use {lowest} to {highest}", field=field)
    return value
