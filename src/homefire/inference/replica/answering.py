"""From the engine's updates to an answer: transcripts of all choices, counts and times."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import msgspec
from msgspec import UNSET

from homefire.foundation.clock import Clock
from homefire.inference.engine.protocol import Prefilled, Sampled, ServedWeights, Started
from homefire.inference.replica.answers import AnswerFormat, ChoicePart, Closing, Envelope
from homefire.inference.replica.order import Order
from homefire.inference.replica.reply import Reply
from homefire.inference.replica.tokenizer import ModelTokenizer
from homefire.inference.replica.transcript import Piece
from homefire.inference.replica.weight_spans import WeightSpans, by_version
from homefire.wire.completions import (
    ErrorChunk,
    HomefireInfo,
    PerfMetrics,
    PromptTokensDetails,
    RawOutput,
    Usage,
    WeightsInfo,
)
from homefire.wire.errors import HomefireError, error_body

_DONE = b"data: [DONE]\n\n"
_encode = msgspec.json.Encoder().encode


class Answer:
    """One request's answer while it comes about."""

    def __init__(
        self,
        order: Order,
        started: Started,
        envelope: Envelope,
        answers: AnswerFormat,
        *,
        tokenizer: ModelTokenizer,
        model_of: Callable[[ServedWeights], str],
        arrived_at: float,
        clock: Clock,
    ) -> None:
        """`model_of`: what answers of these weights call their model."""
        self._order = order
        self._started = started
        self._envelope = envelope
        self._answers = answers
        self._model_of = model_of
        self._arrived_at = arrived_at
        self._clock = clock
        self._transcripts = [order.transcript(i, tokenizer) for i in range(order.num_choices)]
        self._spans = [WeightSpans() for _ in self._transcripts]
        self._num_cached = 0
        self._first_token_at: float | None = None
        self._num_open = order.num_choices

    async def whole(self, reply: Reply) -> bytes:
        async for updates in reply.batches():
            self._take(updates)
        parts = [self._part(i, t.take()) for i, t in enumerate(self._transcripts)]
        return _encode(self._answers.whole(self._envelope, parts, self._closing()))

    async def events(self, reply: Reply, *, request_id: str) -> AsyncIterator[tuple[bytes, bool]]:
        """Server-sent events, and whether they are the last ones; what came together leaves together, but
        each event names the weights that drew its tokens. An error becomes the last event."""
        latest = self._started.weights
        try:
            async for updates in reply.batches():
                for version, alike in by_version(updates, latest):
                    latest = version
                    self._envelope = replace(self._envelope, model=self._model_of(version))
                    if events := self._events(self._take(alike)):
                        yield events, self._num_open == 0
        except HomefireError as error:
            yield _event(_error_chunk(error, request_id)), True

    def headers(self) -> dict[str, str]:
        """The metrics of a whole answer that did not ask for them in its body."""
        if self._order.wants_perf_metrics:
            return {}
        return {f"fireworks-{name}": str(value) for name, value in self._perf_metrics().items()}

    def _take(self, updates: list[Prefilled | Sampled]) -> list[int]:
        """The choices that have news, in order."""
        for update in updates:
            if isinstance(update, Prefilled):
                self._take_prefilled(update)
            else:
                self._take_sampled(update)
        return sorted({update.index for update in updates})

    def _take_prefilled(self, update: Prefilled) -> None:
        order = self._order
        if self._first_token_at is None:
            self._first_token_at = update.at
        if update.index % order.n == 0:
            self._num_cached += update.num_cached_tokens
        echoed = order.echoed(update.index)
        if echoed:
            self._transcripts[update.index].echo(
                echoed,
                update.logprobs,
                update.alternatives,
                from_start=len(echoed) == len(order.prompt_of(update.index)),
            )

    def _take_sampled(self, update: Sampled) -> None:
        if update.finish is not None:
            self._num_open -= 1
        self._spans[update.index].add(len(update.tokens), update.weights)
        self._transcripts[update.index].add(
            update.tokens,
            update.logprobs,
            update.sampling_logprobs,
            update.alternatives,
            update.finish,
        )

    def _events(self, choices: list[int]) -> bytes:
        parts = [
            self._part(choice, piece)
            for choice in choices
            if not (piece := self._transcripts[choice].take()).is_empty
        ]
        if self._num_open:
            return b"".join(self._event(part) for part in parts)
        return b"".join([*self._last_events(parts), _DONE])

    def _last_events(self, parts: list[ChoicePart]) -> list[bytes]:
        """What only the end can tell comes with the last part, or alone where that was asked."""
        if self._order.has_usage_apart:
            return [*map(self._event, parts), self._event(None, self._closing())]
        return [*map(self._event, parts[:-1]), self._event(parts[-1], self._closing())]

    def _event(self, part: ChoicePart | None, closing: Closing | None = None) -> bytes:
        return _event(self._answers.chunk(self._envelope, part, closing))

    def _part(self, choice: int, piece: Piece) -> ChoicePart:
        order, ids = self._order, self._order.wants_token_ids
        is_last = piece.finish is not None and order.wants_raw_output
        return ChoicePart(
            index=choice,
            piece=piece,
            raw_output=self._raw_output(choice) if is_last else UNSET,
            token_ids=piece.tokens if ids else UNSET,
            prompt_token_ids=order.prompt_of(choice) if ids and piece.is_first else UNSET,
        )

    def _raw_output(self, choice: int) -> RawOutput:
        transcript = self._transcripts[choice]
        return RawOutput(transcript.tokens, self._order.prompt_of(choice), transcript.text)

    def _closing(self) -> Closing:
        return Closing(
            usage=self._usage(),
            homefire=self._homefire(),
            perf_metrics=self._perf_metrics() if self._order.wants_perf_metrics else UNSET,
        )

    def _homefire(self) -> HomefireInfo:
        weights = self._started.weights
        is_plain = all(spans.are_all_of(weights) for spans in self._spans)
        return HomefireInfo(
            WeightsInfo(weights.name, weights.digest),
            UNSET if is_plain else [spans.spans for spans in self._spans],
        )

    def _usage(self) -> Usage:
        num_prompt = sum(map(len, self._order.prompts))
        num_echoed = sum(len(self._order.echoed(i)) for i in range(self._order.num_choices))
        num_new = sum(len(t.tokens) for t in self._transcripts) - num_echoed
        details = PromptTokensDetails(self._num_cached)
        return Usage(num_prompt, num_new, num_prompt + num_new, details)

    def _perf_metrics(self) -> PerfMetrics:
        started, now = self._started, self._clock.monotonic()
        first_token_at = now if self._first_token_at is None else self._first_token_at
        return {
            "prefill-queue-duration": round(started.prefill_queue_s, 6),
            "weight-swap-wait": round(started.weight_swap_wait_s, 6),
            "generation-queue-duration": 0.0,
            "num-concurrent-requests": started.num_running,
            "prompt-tokens": sum(map(len, self._order.prompts)),
            "cached-prompt-tokens": self._num_cached,
            "server-time-to-first-token": round(first_token_at - self._arrived_at, 6),
            "server-processing-time": round(now - self._arrived_at, 6),
        }


def _event(chunk: msgspec.Struct) -> bytes:
    return b"data: " + _encode(chunk) + b"\n\n"


def _error_chunk(error: HomefireError, request_id: str) -> ErrorChunk:
    detail: dict[str, Any] = error_body(error, request_id=request_id)["error"]
    return ErrorChunk({**detail, "status": error.http_status})
