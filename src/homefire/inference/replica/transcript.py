"""What one sequence has said so far: its text, its tokens and their logprobs, cut where they were asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from homefire.inference.engine.protocol import Alternatives
from homefire.inference.replica.detokenizer import detokenizer
from homefire.inference.replica.stop_text import StopText
from homefire.inference.replica.tokenizer import ModelTokenizer
from homefire.wire.completions import (
    FinishReason,
    Logprobs,
    TokenLogprob,
    TopLogprob,
)


class LogprobStyle(StrEnum):
    """Which of the two shapes of logprobs a request asked for, by the type of its field."""

    NONE = "none"
    """Neither."""
    CONTENT = "content"
    """`logprobs: true`."""
    LEGACY = "legacy"
    """`logprobs: 3`."""


@dataclass(frozen=True)
class Piece:
    """What is new since the last one."""

    text: str
    tokens: list[int]
    logprobs: Logprobs | None
    finish: FinishReason | None
    is_first: bool

    @property
    def is_empty(self) -> bool:
        return not (self.tokens or self.text or self.logprobs or self.finish)


@dataclass(slots=True)
class _Scored:
    token: int
    logprob: float | None
    sampling_logprob: float
    alternatives: Alternatives
    text_offset: int


class Transcript:
    """Text ends before a stop string and before a stop token; tokens include them."""

    def __init__(
        self,
        tokenizer: ModelTokenizer,
        *,
        after: Sequence[int] = (),
        stops: Sequence[str] = (),
        stop_token_ids: frozenset[int] = frozenset(),
        style: LogprobStyle = LogprobStyle.NONE,
        name_of: Callable[[int], str] | None = None,
    ) -> None:
        """`name_of`: what logprobs call a token; its text when there is none."""
        self._tokenizer = tokenizer
        self._name_of = name_of or tokenizer.token_text
        self._detokenizer = detokenizer(tokenizer, after=after)
        self._stop_text = StopText(stops)
        self._stop_token_ids = stop_token_ids
        self._style = style
        self._offset = 0
        """Characters of text made so far, held ones included."""
        self.text = ""
        self.tokens: list[int] = []
        self.finish: FinishReason | None = None
        self._text_out = 0
        self._tokens_out = 0
        self._scored: list[_Scored] = []

    def echo(
        self,
        tokens: Sequence[int],
        logprobs: Sequence[float],
        alternatives: Sequence[Alternatives],
        *,
        from_start: bool,
    ) -> None:
        """Prompt tokens, before any sampled one. `from_start`: the first of them has no logprob."""
        for i, token in enumerate(tokens):
            if self._style is not LogprobStyle.NONE:
                logprob = None if from_start and i == 0 else logprobs[i]
                tops = alternatives[i] if alternatives else []
                self._scored.append(_Scored(token, logprob, logprob or 0.0, tops, self._offset))
            self._say(self._detokenizer.push([token]))
        self.tokens += tokens

    def add(
        self,
        tokens: Sequence[int],
        logprobs: Sequence[float],
        sampling_logprobs: Sequence[float],
        alternatives: Sequence[Alternatives],
        finish: FinishReason | None,
    ) -> None:
        self.tokens += tokens
        if self._style is LogprobStyle.NONE:
            self._read(tokens, finish)
        else:
            for i, token in enumerate(tokens):
                tops = alternatives[i] if alternatives else []
                self._scored.append(
                    _Scored(token, logprobs[i], sampling_logprobs[i], tops, self._offset)
                )
                self._read([token], finish if i == len(tokens) - 1 else None)
        if finish is not None:
            self._end(finish)

    def take(self) -> Piece:
        """Everything since the last call."""
        piece = Piece(
            text=self.text[self._text_out :],
            tokens=self.tokens[self._tokens_out :],
            logprobs=self._take_logprobs(),
            finish=self.finish,
            is_first=self._text_out == 0 and self._tokens_out == 0,
        )
        self._text_out, self._tokens_out = len(self.text), len(self.tokens)
        return piece

    def _read(self, tokens: Sequence[int], finish: FinishReason | None) -> None:
        if finish is FinishReason.STOP and tokens and tokens[-1] in self._stop_token_ids:
            tokens = tokens[:-1]
        text = self._detokenizer.push(tokens)
        self._offset += len(text)
        self.text += self._stop_text.feed(text)[0]

    def _say(self, text: str) -> None:
        self._offset += len(text)
        self.text += text

    def _end(self, finish: FinishReason) -> None:
        """Text that was held back goes out, unless it is held for good behind a stop string."""
        self.finish = finish
        rest, is_stopped = self._stop_text.feed(self._detokenizer.flush())
        self.text += rest
        if not is_stopped:
            self.text += self._stop_text.flush()

    def _take_logprobs(self) -> Logprobs | None:
        scored, self._scored = self._scored, []
        if not scored:
            return None
        if self._style is LogprobStyle.LEGACY:
            return self._legacy(scored)
        return Logprobs(content=[self._content_entry(entry) for entry in scored])

    def _content_entry(self, entry: _Scored) -> TokenLogprob:
        return TokenLogprob(
            token=self._name_of(entry.token),
            token_id=entry.token,
            logprob=entry.logprob or 0.0,
            sampling_logprob=entry.sampling_logprob,
            bytes=list(self._tokenizer.token_bytes(entry.token)),
            text_offset=entry.text_offset,
            top_logprobs=[self._top(*alternative) for alternative in entry.alternatives],
        )

    def _top(self, token: int, logprob: float) -> TopLogprob:
        spelled = list(self._tokenizer.token_bytes(token))
        return TopLogprob(self._name_of(token), token, logprob, spelled)

    def _legacy(self, scored: list[_Scored]) -> Logprobs:
        return Logprobs(
            tokens=[self._name_of(entry.token) for entry in scored],
            token_ids=[entry.token for entry in scored],
            token_logprobs=[entry.logprob for entry in scored],
            top_logprobs=[self._legacy_tops(entry) for entry in scored],
            text_offset=[entry.text_offset for entry in scored],
        )

    def _legacy_tops(self, entry: _Scored) -> dict[str, float] | None:
        """By name, likeliest first and the token itself last, as OpenAI does: of two tokens that
        look the same the likelier stays."""
        if entry.logprob is None or not entry.alternatives:
            return None
        tops: dict[str, float] = {}
        for token, logprob in [*entry.alternatives, (entry.token, entry.logprob)]:
            tops.setdefault(self._name_of(token), logprob)
        return tops
