"""The JSON of an answer, whole or in chunks, for completions and for chat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import msgspec
from msgspec import UNSET, UnsetType

from homefire.inference.replica.transcript import Piece
from homefire.wire.completions import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    Completion,
    CompletionChoice,
    Generated,
    GeneratedChoice,
    HomefireInfo,
    PerfMetrics,
    RawOutput,
    Usage,
)


@dataclass(frozen=True)
class Envelope:
    """What every chunk of one answer repeats."""

    id: str
    created: int
    model: str


@dataclass(frozen=True)
class ChoicePart:
    """One choice, or what is new of it."""

    index: int
    piece: Piece
    raw_output: RawOutput | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


@dataclass(frozen=True)
class Closing:
    """What only the end of an answer can tell."""

    usage: Usage
    homefire: HomefireInfo
    perf_metrics: PerfMetrics | UnsetType = UNSET


class AnswerFormat(Protocol):
    id_prefix: str

    def whole(
        self, envelope: Envelope, parts: list[ChoicePart], closing: Closing
    ) -> msgspec.Struct: ...

    def chunk(
        self, envelope: Envelope, part: ChoicePart | None, closing: Closing | None
    ) -> msgspec.Struct:
        """Of a stream. `closing` is in the last one, which may have no part of a choice."""
        ...


class CompletionFormat:
    id_prefix = "cmpl-"

    def whole(self, envelope: Envelope, parts: list[ChoicePart], closing: Closing) -> Completion:
        return self._answer(envelope, parts, closing)

    def chunk(
        self, envelope: Envelope, part: ChoicePart | None, closing: Closing | None
    ) -> Completion:
        return self._answer(envelope, [] if part is None else [part], closing)

    def _answer(
        self, envelope: Envelope, parts: list[ChoicePart], closing: Closing | None
    ) -> Completion:
        return Completion(
            id=envelope.id,
            created=envelope.created,
            model=envelope.model,
            choices=[_completion_choice(part) for part in parts],
            usage=closing.usage if closing else UNSET,
            perf_metrics=closing.perf_metrics if closing else UNSET,
            homefire=closing.homefire if closing else UNSET,
        )


class ChatFormat:
    id_prefix = "chatcmpl-"

    def whole(
        self, envelope: Envelope, parts: list[ChoicePart], closing: Closing
    ) -> ChatCompletion:
        return ChatCompletion(
            id=envelope.id,
            created=envelope.created,
            model=envelope.model,
            choices=[_chat_choice(part) for part in parts],
            prompt_token_ids=parts[0].prompt_token_ids,
            usage=closing.usage,
            perf_metrics=closing.perf_metrics,
            homefire=closing.homefire,
        )

    def chunk(
        self, envelope: Envelope, part: ChoicePart | None, closing: Closing | None
    ) -> ChatCompletionChunk:
        return ChatCompletionChunk(
            id=envelope.id,
            created=envelope.created,
            model=envelope.model,
            choices=[] if part is None else [_chat_chunk_choice(part)],
            prompt_token_ids=UNSET if part is None else part.prompt_token_ids,
            usage=closing.usage if closing else UNSET,
            perf_metrics=closing.perf_metrics if closing else UNSET,
            homefire=closing.homefire if closing else UNSET,
        )


class GenerateFormat:
    """Tokens only."""

    id_prefix = ""

    def whole(self, envelope: Envelope, parts: list[ChoicePart], closing: Closing) -> Generated:
        return self._answer(envelope, parts, closing)

    def chunk(
        self, envelope: Envelope, part: ChoicePart | None, closing: Closing | None
    ) -> Generated:
        return self._answer(envelope, [] if part is None else [part], closing)

    def _answer(
        self, envelope: Envelope, parts: list[ChoicePart], closing: Closing | None
    ) -> Generated:
        return Generated(
            request_id=envelope.id,
            model=envelope.model,
            choices=[_generated_choice(part) for part in parts],
            prompt_token_ids=parts[0].prompt_token_ids if parts else UNSET,
            usage=closing.usage if closing else UNSET,
            homefire=closing.homefire if closing else UNSET,
        )


def _generated_choice(part: ChoicePart) -> GeneratedChoice:
    return GeneratedChoice(
        index=part.index,
        token_ids=part.piece.tokens,
        logprobs=part.piece.logprobs,
        finish_reason=part.piece.finish,
    )


def _completion_choice(part: ChoicePart) -> CompletionChoice:
    return CompletionChoice(
        index=part.index,
        text=part.piece.text,
        logprobs=part.piece.logprobs,
        finish_reason=part.piece.finish,
        raw_output=part.raw_output,
        token_ids=part.token_ids,
        prompt_token_ids=part.prompt_token_ids,
    )


def _chat_choice(part: ChoicePart) -> ChatChoice:
    return ChatChoice(
        index=part.index,
        message=AssistantMessage(part.piece.text),
        logprobs=part.piece.logprobs,
        finish_reason=part.piece.finish,
        raw_output=part.raw_output,
        token_ids=part.token_ids,
        prompt_token_ids=part.prompt_token_ids,
    )


def _chat_chunk_choice(part: ChoicePart) -> ChatChunkChoice:
    role = "assistant" if part.piece.is_first else UNSET
    return ChatChunkChoice(
        index=part.index,
        delta=ChatDelta(part.piece.text, role),
        logprobs=part.piece.logprobs,
        finish_reason=part.piece.finish,
        raw_output=part.raw_output,
        token_ids=part.token_ids,
        prompt_token_ids=part.prompt_token_ids,
    )
