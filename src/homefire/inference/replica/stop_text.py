"""Stop strings, across the borders of tokens."""

from __future__ import annotations

from collections.abc import Sequence

from homefire.inference.replica.detokenizer import detokenizer
from homefire.inference.replica.tokenizer import ModelTokenizer


class StopText:
    """Lets text through up to the first stop string, and holds back what may be the start of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""

    def feed(self, text: str) -> tuple[str, bool]:
        """(text that may go out, whether a stop string was completed). Nothing follows a stop."""
        if not self._stops:
            return text, False
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            return self._release(min(found)), True
        return self._release(len(self._held) - self._num_suspect()), False

    def flush(self) -> str:
        return self._release(len(self._held))

    def _release(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        return text

    def _num_suspect(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for count in range(min(longest, len(self._held)), 0, -1):
            tail = self._held[-count:]
            if any(stop.startswith(tail) for stop in self._stops):
                return count
        return 0


class StopOnText:
    """The engine's side: a `StopCondition` that ends a sequence as soon as its text says so."""

    def __init__(
        self, tokenizer: ModelTokenizer, stops: Sequence[str], *, after: Sequence[int] = ()
    ) -> None:
        """`after`: the prompt, which is not searched."""
        self._detokenizer = detokenizer(tokenizer, after=after)
        self._stop_text = StopText(stops)

    def push(self, token: int) -> bool:
        _, is_stopped = self._stop_text.feed(self._detokenizer.push([token]))
        return is_stopped
