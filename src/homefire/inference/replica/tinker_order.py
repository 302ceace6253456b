"""An `asample`, checked whole and spelled out: what to generate and score, and what of it to answer with."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from homefire.inference.engine.protocol import (
    PromptDraws,
    PromptScoring,
    Sampling,
    SequenceRequest,
)
from homefire.inference.replica.order import ModelLimits
from homefire.inference.replica.stop_text import StopOnText
from homefire.inference.replica.tokenizer import ModelTokenizer
from homefire.wire.errors import (
    InvalidArgument,
    LengthMismatch,
    SequenceTooLong,
    TokenOutOfRange,
    Unsupported,
)
from homefire.wire.tinker_sampling import IdTensor, Prompt, SampleRequest, SamplingParams

MAX_SAMPLES = 1024
MAX_STOPS = 64
MAX_STOP_CHARACTERS = 1024
MAX_CELLS = 1 << 22
"""Prompt positions times what is wanted of each."""
_NEXT_SAMPLE = 1 << 64
"""Between the seeds of one request's samples: sample 0 has the request's own."""

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Targets:
    """Ids to score, and the layout to answer them in."""

    rows: tuple[tuple[int, ...], ...]
    """Row i at prompt position i + 1."""
    shape: list[int]
    sparse_crow_indices: list[int] | None = None
    sparse_col_indices: list[int] | None = None


@dataclass(frozen=True)
class SampleOrder:
    prompt: tuple[int, ...]
    num_samples: int
    max_new_tokens: int
    sampling: Sampling
    seed: int | None
    stops: tuple[str, ...]
    stop_token_ids: frozenset[int]
    num_alternatives: int
    """At sampled positions."""
    scoring: PromptScoring | None
    wants_prompt_logprobs: bool
    targets: Targets | None

    def sequences(self, tokenizer: ModelTokenizer) -> list[SequenceRequest]:
        """The prompt is scored once, with the first sample."""
        return [
            SequenceRequest(
                prompt=self.prompt,
                max_new_tokens=self.max_new_tokens,
                sampling=self.sampling,
                seed=None if self.seed is None else abs(self.seed) + index * _NEXT_SAMPLE,
                stop_token_ids=self.stop_token_ids,
                stop=StopOnText(tokenizer, self.stops, after=self.prompt) if self.stops else None,
                num_alternatives=self.num_alternatives,
                scoring=self.scoring if index == 0 else None,
            )
            for index in range(self.num_samples)
        ]


def order_sample(
    request: SampleRequest, tokenizer: ModelTokenizer, limits: ModelLimits
) -> SampleOrder:
    """Raises UserError, naming the field: nothing is ignored that would change the answer."""
    _refuse_stability_info(request)
    params = request.sampling_params
    num_samples = _within("num_samples", request.num_samples, 1, 1, MAX_SAMPLES)
    prompt = _prompt(request.prompt, limits)
    stops, stop_token_ids = _stops(params, tokenizer, limits)
    sampling = _sampling(params)
    targets = _targets(request.target_prompt_logprobs, prompt, limits)
    return SampleOrder(
        prompt=prompt,
        num_samples=num_samples,
        max_new_tokens=_max_new_tokens(params, prompt, limits),
        sampling=sampling,
        seed=params.seed,
        stops=stops,
        stop_token_ids=stop_token_ids,
        num_alternatives=_within(
            "topk_sample_logprobs", request.topk_sample_logprobs, 0, 0, limits.vocab_size
        ),
        scoring=_scoring(request, prompt, targets, sampling, limits),
        wants_prompt_logprobs=bool(request.prompt_logprobs),
        targets=targets,
    )


def _refuse_stability_info(request: SampleRequest) -> None:
    if request.record_stability_info:
        raise Unsupported(
            "record_stability_info is not supported: its objective is not published",
            hint="train with importance_sampling, ppo, cispo or gspo, which need none",
            field="record_stability_info",
        )


def _prompt(prompt: Prompt, limits: ModelLimits) -> tuple[int, ...]:
    tokens: list[int] = []
    for index, chunk in enumerate(prompt.chunks):
        if chunk.tokens is None or chunk.kind != "encoded_text":
            raise Unsupported(
                f"prompt chunk {index} is {chunk.kind!r}: this model reads text only",
                hint="send encoded_text chunks",
                field=f"prompt.chunks[{index}]",
            )
        tokens += chunk.tokens
    if not tokens:
        raise InvalidArgument("the prompt is empty", hint="send at least one token", field="prompt")
    if len(tokens) > limits.max_context_length:
        raise SequenceTooLong(
            f"the prompt has {len(tokens)} tokens, the context {limits.max_context_length}",
            hint="shorten the prompt",
            field="prompt",
        )
    _check_tokens(tokens, limits, field="prompt")
    return tuple(tokens)


def _check_tokens(tokens: Sequence[int], limits: ModelLimits, *, field: str) -> None:
    if tokens and not (min(tokens) >= 0 and max(tokens) < limits.vocab_size):
        wrong = next(token for token in tokens if not 0 <= token < limits.vocab_size)
        raise TokenOutOfRange(
            f"{field} has token {wrong}, the vocabulary ends at {limits.vocab_size - 1}",
            hint="encode with this model's tokenizer",
            field=field,
        )


def _max_new_tokens(params: SamplingParams, prompt: tuple[int, ...], limits: ModelLimits) -> int:
    """A prompt that fills the context can still be scored: the one token behind it is never fed back."""
    room = max(limits.max_context_length - len(prompt), 1)
    return min(_within("max_tokens", params.max_tokens, room, 0, 1 << 31), room)


def _sampling(params: SamplingParams) -> Sampling:
    top_p = _within("top_p", params.top_p, 1.0, 0.0, 1.0)
    if top_p == 0:
        raise InvalidArgument("top_p is 0", hint="use more than 0 and up to 1", field="top_p")
    return Sampling(
        temperature=_within("temperature", params.temperature, 1.0, 0.0, 100.0),
        top_p=top_p,
        top_k=max(_within("top_k", params.top_k, -1, -1, 1 << 31), 0),
    )


def _stops(
    params: SamplingParams, tokenizer: ModelTokenizer, limits: ModelLimits
) -> tuple[tuple[str, ...], frozenset[int]]:
    """The end of sequence stops too, unless the list is empty: then nothing does. A special token has
    no text to be found in, so its name is its id."""
    if params.stop is None:
        return (), tokenizer.eos_token_ids
    given = [params.stop] if isinstance(params.stop, str) else params.stop
    if not given:
        return (), frozenset()
    texts = [item for item in given if isinstance(item, str)]
    ids = [item for item in given if isinstance(item, int)]
    _check_tokens(ids, limits, field="stop")
    if "" in texts or len(given) > MAX_STOPS or any(len(t) > MAX_STOP_CHARACTERS for t in texts):
        raise InvalidArgument(
            "stop has an empty, too long or too many strings",
            hint=f"send up to {MAX_STOPS}, of 1 to {MAX_STOP_CHARACTERS} characters",
            field="stop",
        )
    special = {text: found for text in texts if (found := tokenizer.special_id(text)) is not None}
    plain = tuple(text for text in texts if text not in special)
    return plain, frozenset([*ids, *special.values()]) | tokenizer.eos_token_ids


def _scoring(
    request: SampleRequest,
    prompt: tuple[int, ...],
    targets: Targets | None,
    sampling: Sampling,
    limits: ModelLimits,
) -> PromptScoring | None:
    top_k = _within("topk_prompt_logprobs", request.topk_prompt_logprobs, 0, 0, limits.vocab_size)
    num_draws = _within("prompt_alt_tokens_k", request.prompt_alt_tokens_k, 0, 0, MAX_CELLS)
    _check_cells(prompt, top_k, field="topk_prompt_logprobs")
    _check_cells(prompt, num_draws, field="prompt_alt_tokens_k")
    first = _first_scored(request, prompt)
    logprobs_from = first if request.prompt_logprobs or top_k else None
    if logprobs_from is None and targets is None and num_draws == 0:
        return None
    return PromptScoring(
        logprobs_from=logprobs_from,
        num_alternatives=top_k,
        targets=targets.rows if targets else (),
        draws=_draws(num_draws, request.sampling_params, sampling) if num_draws else None,
    )


def _draws(count: int, params: SamplingParams, sampling: Sampling) -> PromptDraws:
    seed = secrets.randbits(64) if params.seed is None else abs(params.seed)
    return PromptDraws(count, sampling.temperature, seed)


def _first_scored(request: SampleRequest, prompt: tuple[int, ...]) -> int:
    last_n = request.prompt_logprobs_last_n
    if last_n is None:
        return 0
    if not request.prompt_logprobs:
        raise InvalidArgument(
            "prompt_logprobs_last_n is set, prompt_logprobs is not",
            hint="ask for prompt_logprobs too",
            field="prompt_logprobs_last_n",
        )
    if not 1 <= last_n < len(prompt):
        raise InvalidArgument(
            f"prompt_logprobs_last_n is {last_n}, the prompt has {len(prompt)} tokens",
            hint=f"use 1 to {len(prompt) - 1}",
            field="prompt_logprobs_last_n",
        )
    return len(prompt) - last_n


def _targets(
    given: IdTensor | None, prompt: tuple[int, ...], limits: ModelLimits
) -> Targets | None:
    if given is None:
        return None
    field = "target_prompt_logprobs"
    if given.dtype != "int64" or given.shape is None or len(given.shape) != 2:
        raise InvalidArgument(
            f"{field} is {given.dtype} {given.shape}",
            hint="send int64 ids of shape [len(prompt) - 1, K]",
            field=field,
        )
    num_rows, width = given.shape
    if num_rows != len(prompt) - 1:
        raise LengthMismatch(
            f"{field} has {num_rows} rows, the prompt {len(prompt)} tokens",
            hint="send one row per position after the first",
            field=field,
        )
    _check_cells(prompt, width, field=field)
    ends = _row_ends(given, num_rows, width)
    asked = [token for token in given.data if token != -1]
    if not asked:
        raise InvalidArgument(f"{field} names no id", hint="leave it out", field=field)
    _check_tokens(asked, limits, field=field)
    rows = tuple(tuple(given.data[start:end]) for start, end in zip([0, *ends], ends, strict=False))
    return Targets(rows, given.shape, given.sparse_crow_indices, given.sparse_col_indices)


def _row_ends(given: IdTensor, num_rows: int, width: int) -> list[int]:
    """Where each row's values end in `data`."""
    field, size = "target_prompt_logprobs", len(given.data)
    if given.sparse_crow_indices is None:
        if width < 1 or size != num_rows * width:
            raise LengthMismatch(f"{field} has {size} ids but shape {given.shape}", field=field)
        return [(row + 1) * width for row in range(num_rows)]
    crow, col = given.sparse_crow_indices, given.sparse_col_indices or []
    is_sane = (
        len(crow) == num_rows + 1
        and crow[0] == 0
        and crow == sorted(crow)
        and crow[-1] == size == len(col)
        and all(0 <= column < width for column in col)
    )
    if not is_sane:
        raise InvalidArgument(f"{field} has inconsistent sparse indices", field=field)
    return crow[1:]


def _check_cells(prompt: tuple[int, ...], width: int, *, field: str) -> None:
    if len(prompt) * width > MAX_CELLS:
        raise InvalidArgument(
            f"{field} {width} for {len(prompt)} positions is more than {MAX_CELLS} numbers",
            hint="ask for fewer",
            field=field,
        )


def _within(
    field: str, value: Number | None, default: Number, lowest: Number, highest: Number
) -> Number:
    if value is None:
        return default
    if not lowest <= value <= highest:
        raise InvalidArgument(f"{field} is {value}", hint=f"use {lowest} to {highest}", field=field)
    return value
