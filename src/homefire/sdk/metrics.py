"""What the server says about the load it was under, with each completion."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

_FIELDS: tuple[tuple[str, str, Callable[[Any], float | int]], ...] = (
    ("num_concurrent_requests", "num-concurrent-requests", int),
    ("prefill_queue_duration", "prefill-queue-duration", float),
    ("generation_queue_duration", "generation-queue-duration", float),
    ("server_ttft", "server-time-to-first-token", float),
    ("cached_prompt_tokens", "cached-prompt-tokens", int),
    ("prompt_tokens", "prompt-tokens", int),
    ("server_processing_time", "server-processing-time", float),
)
_PREFIX = "fireworks-"


@dataclass
class ServerMetrics:
    """Metrics of one completion; None where the server said nothing. Durations are seconds."""

    num_concurrent_requests: int | None = None
    prefill_queue_duration: float | None = None
    """From arrival to the start of prefill: what the adaptive controller steers by."""
    generation_queue_duration: float | None = None
    server_ttft: float | None = None
    """Time to the first token, seen by the server."""
    cached_prompt_tokens: int | None = None
    prompt_tokens: int | None = None
    server_processing_time: float | None = None
    client_ttft: float | None = None
    """Time to the first byte of the stream, seen by this client."""
    http_status_code: int | None = None
    transport_error: bool = False
    """The server was not reached, or the connection broke."""
    retry_attempt: int | None = None
    """Which attempt of the request this was, from 0."""

    @classmethod
    def from_headers(cls, headers: dict[str, str], client_ttft: float | None = None) -> Self:
        """From response headers, with or without the `fireworks-` prefix, in any case."""
        plain = {name.lower().removeprefix(_PREFIX): value for name, value in headers.items()}
        return cls.from_values(plain, client_ttft)

    @classmethod
    def from_values(cls, values: Mapping[str, Any], client_ttft: float | None = None) -> Self:
        """From a `perf_metrics` object, whose values are numbers or strings of numbers."""
        found: dict[str, Any] = {}
        for field, key, convert in _FIELDS:
            number = _number(values.get(key))
            if number is not None:
                found[field] = convert(number)
        return cls(**found, client_ttft=client_ttft)

    @classmethod
    def of_failure(cls, status: int | None, attempt: int) -> Self:
        """Of an attempt that brought no completion; `status` None: no answer came at all."""
        return cls(http_status_code=status, transport_error=status is None, retry_attempt=attempt)


def _number(value: Any) -> float | None:
    """A metric that cannot be read is absent: it must not cost the completion."""
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError):
        return None
