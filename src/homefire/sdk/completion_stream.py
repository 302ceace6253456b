"""A streamed completion, put together from the bytes of its server-sent events."""

from __future__ import annotations

from typing import Any

import msgspec

from homefire.sdk.connection import Json

_DATA = b"data: "
_decode = msgspec.json.Decoder().decode


class StreamError(Exception):
    """The stream said that it failed, or ended too early. `status` is an HTTP status or None."""

    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class CompletionStream:
    """Feed it bytes as they come; `response()` is what a call without `stream` would have given.

    Raises StreamError when an event carries an error. Comments, pings and unknown events are
    skipped. One choice per stream (n = 1).
    """

    def __init__(self) -> None:
        self._pending = b""
        self._envelope: Json = {}
        self._choice: Json = {"index": 0, "finish_reason": None, "logprobs": None}
        self._text: list[str] = []

    def feed(self, data: bytes) -> None:
        data = self._pending + data
        if b"\r" in data:
            # A trailing CR may be half of a CRLF: it waits for the next bytes.
            kept = data[-1:] if data.endswith(b"\r") else b""
            data = data[: len(data) - len(kept)].replace(b"\r\n", b"\n") + kept
        *events, self._pending = data.split(b"\n\n")
        for event in events:
            self._take(event)

    @property
    def is_finished(self) -> bool:
        """A finish reason was seen."""
        return self._choice["finish_reason"] is not None

    def response(self) -> Json:
        """StreamError when the stream ended without a finish reason."""
        if not self.is_finished:
            raise StreamError("the stream ended without a finish_reason")
        return {**self._envelope, "choices": [{**self._choice, "text": "".join(self._text)}]}

    def _take(self, event: bytes) -> None:
        if event.startswith(_DATA) and b"\n" not in event:
            self._take_data(event[len(_DATA) :])
            return
        lines = [line for line in event.split(b"\n") if line and not line.startswith(b":")]
        data = b"\n".join(
            line.partition(b":")[2].removeprefix(b" ")
            for line in lines
            if line.startswith(b"data:")
        )
        if b"event: error" in lines and not data:
            raise StreamError("the server ended the stream with an error event")
        if data:
            self._take_data(data)

    def _take_data(self, data: bytes) -> None:
        if data == b"[DONE]":
            return
        try:
            chunk = _decode(data)
        except msgspec.DecodeError as exc:
            raise StreamError(f"an event of the stream is not JSON: {data[:200]!r}") from exc
        if not isinstance(chunk, dict):
            return
        if chunk.get("error"):
            raise _error_of(chunk["error"])
        for choice in chunk.pop("choices", None) or []:
            self._join(choice)
        self._envelope.update((key, value) for key, value in chunk.items() if value is not None)

    def _join(self, choice: Json) -> None:
        self._text.append(choice.pop("text", None) or "")
        logprobs = choice.pop("logprobs", None)
        if logprobs:
            self._join_logprobs(logprobs)
        self._choice.update((key, value) for key, value in choice.items() if value is not None)

    def _join_logprobs(self, part: dict[str, Any]) -> None:
        whole = self._choice["logprobs"]
        if whole is None:
            self._choice["logprobs"] = part
            return
        for key, values in part.items():
            if isinstance(values, list):
                whole.setdefault(key, []).extend(values)


def _error_of(error: Any) -> StreamError:
    if not isinstance(error, dict):
        return StreamError(str(error))
    status = error.get("status") or error.get("status_code")
    return StreamError(
        str(error.get("message") or error), status=status if isinstance(status, int) else None
    )
