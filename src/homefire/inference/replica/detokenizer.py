"""Text from tokens as they come, never half a character."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from homefire.inference.replica.tokenizer import ModelTokenizer

_REPLACEMENT = "\ufffd"
_LONGEST_CHARACTER = 4
"""Bytes of one character in UTF-8, so tokens that may have to be waited for."""


class Detokenizer(Protocol):
    """The pieces joined are the decoded whole, however the tokens are grouped."""

    def push(self, tokens: Sequence[int]) -> str:
        """The text that these tokens complete. Special tokens have none."""
        ...

    def flush(self) -> str:
        """What is left: the replacement of an incomplete character, or nothing."""
        ...


def detokenizer(tokenizer: ModelTokenizer, *, after: Sequence[int] = ()) -> Detokenizer:
    """`after`: the tokens before the first one pushed; their text is not repeated."""
    if tokenizer.is_byte_level:
        return ByteLevelText(tokenizer)
    return WindowedText(tokenizer, after=after[-1:])


class ByteLevelText:
    """Of a byte-level tokenizer (GPT-2, Llama 3, Qwen, …): its tokens are bytes, exactly."""

    def __init__(self, tokenizer: ModelTokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, tokens: Sequence[int]) -> str:
        spell, is_special = self._tokenizer.token_bytes, self._tokenizer.is_special
        return self._decoder.decode(b"".join(spell(t) for t in tokens if not is_special(t)))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class WindowedText:
    """Of any other tokenizer, through its own decoder.

    A token's text depends on the one before it (word marks, byte fallback), so each is decoded together
    with the last token whose text is out.
    """

    def __init__(self, tokenizer: ModelTokenizer, *, after: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._context = list(after)
        self._pending: list[int] = []

    def push(self, tokens: Sequence[int]) -> str:
        return "".join(self._push(token) for token in tokens)

    def flush(self) -> str:
        return self._release(self._text()) if self._pending else ""

    def _push(self, token: int) -> str:
        if self._tokenizer.is_special(token):
            return ""
        self._pending.append(token)
        text = self._text()
        if text.endswith(_REPLACEMENT) and len(self._pending) < _LONGEST_CHARACTER:
            return ""
        return self._release(text)

    def _text(self) -> str:
        before = self._tokenizer.decode(self._context)
        return self._tokenizer.decode(self._context + self._pending)[len(before) :]

    def _release(self, text: str) -> str:
        self._context, self._pending = self._pending, []
        return text
