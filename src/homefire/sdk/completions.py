"""What a sampled completion is to a training loop: tokens and logprobs, aligned one to one. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from homefire.sdk.connection import Json
from homefire.sdk.weights import WeightsIdentity, WeightsSpan


@dataclass
class SampledCompletion:
    """One completion of one prompt.

    Example: SampledCompletion(text="1257", full_tokens=[53, 62, 49, …], prompt_len=2, …).
    """

    text: str
    """Of the completion alone."""
    full_tokens: list[int]
    """Prompt, then completion, as the server saw them."""
    prompt_len: int
    finish_reason: str = "unknown"
    """`stop` or `length`."""
    completion_len: int = 0
    inference_logprobs: list[float] | None = None
    """Raw model logprob per completion token when `logprobs` was asked; with `echo` per token of
    `full_tokens` but the first, which has none."""
    logprobs_echoed: bool = False
    """Whether the logprobs cover the prompt too."""
    routing_matrices: list[str] | None = None
    """Base64, one per logprob entry, when routing matrices were asked."""
    weights: WeightsIdentity | None = None
    """Which weights made it, or, after a hot load in place, its beginning; None when the server does not
    say."""
    weights_spans: list[WeightsSpan] | None = None
    """Which weights drew which tokens of the completion: one span, but after a hot load in place. None when
    the server does not say."""
    sampling_logprobs: list[float] | None = None
    """As `inference_logprobs`, under the distribution that was sampled from (temperature, top-p,
    top-k): the behaviour policy. None unless the server gave one for every token."""


def completion_of(
    response: Json,
    prompt: Sequence[int],
    *,
    weights: WeightsIdentity | None,
    num_echoed: int = 0,
) -> SampledCompletion:
    """From the joined stream. `num_echoed` is how many prompt tokens lead the answer's tokens.

    RuntimeError when the server left out the token ids, when its echo is not the prompt, or when
    tokens and logprobs disagree in number.
    """
    choice: Json = response["choices"][0]
    raw: Json = choice.get("raw_output") or {}
    prompt_ids: list[int] = (
        choice.get("prompt_token_ids") or raw.get("prompt_token_ids") or list(prompt)
    )
    completion_ids = _completion_ids(raw, prompt_ids, num_echoed)
    entries = _entries(choice.get("logprobs"), expected=num_echoed + len(completion_ids))
    if entries is not None and 0 < num_echoed == len(prompt_ids):
        entries = entries[1:]
    return SampledCompletion(
        text=raw.get("completion", choice["text"]) if num_echoed else choice["text"],
        full_tokens=[*prompt_ids, *completion_ids],
        prompt_len=len(prompt_ids),
        finish_reason=choice.get("finish_reason") or "unknown",
        completion_len=len(completion_ids),
        inference_logprobs=_column(entries, "logprob"),
        logprobs_echoed=entries is not None and num_echoed > 0,
        routing_matrices=_column(entries, "routing_matrix"),
        weights=weights,
        sampling_logprobs=_column(entries, "sampling_logprob"),
        weights_spans=_spans(response, weights, len(completion_ids)),
    )


def weights_of(response: Json, header: str | None) -> WeightsIdentity | None:
    """From the final chunk, else from the header."""
    named = (response.get("homefire") or {}).get("weights")
    if named:
        return WeightsIdentity(named["identity"], named.get("digest", ""))
    return WeightsIdentity.from_header(header) if header else None


def _spans(
    response: Json, weights: WeightsIdentity | None, num_tokens: int
) -> list[WeightsSpan] | None:
    named = (response.get("homefire") or {}).get("spans")
    if named:
        return [
            WeightsSpan(s["start"], s["end"], WeightsIdentity(s["identity"], s["digest"]))
            for s in named[0]
        ]
    return None if weights is None else [WeightsSpan(0, num_tokens, weights)]


def _completion_ids(raw: Json, prompt_ids: list[int], num_echoed: int) -> list[int]:
    ids = raw.get("completion_token_ids")
    if ids is None:
        raise RuntimeError(
            "the server left out raw_output.completion_token_ids; "
            "token-level sampling needs a server that honours raw_output"
        )
    if num_echoed and ids[:num_echoed] != prompt_ids[len(prompt_ids) - num_echoed :]:
        raise RuntimeError("the echoed tokens are not the end of the prompt")
    return ids[num_echoed:]


def _entries(logprobs: Json | None, *, expected: int) -> list[Json] | None:
    """One entry per returned token, from either shape of `logprobs`."""
    if not logprobs:
        return None
    entries = logprobs.get("content")
    if entries is None:
        entries = [{"logprob": value} for value in logprobs.get("token_logprobs") or []]
    if len(entries) != expected:
        raise RuntimeError(f"the server sent {len(entries)} logprobs for {expected} tokens")
    return entries


def _column(entries: list[Json] | None, key: str) -> list[Any] | None:
    """The value of every entry; None unless all have one."""
    if entries is None:
        return None
    values = [entry.get(key) for entry in entries]
    return None if any(value is None for value in values) else values
