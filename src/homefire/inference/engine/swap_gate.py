"""How long new sequences had to wait because weights were being swapped."""

from __future__ import annotations

from collections import deque

_REMEMBERED = 256


class SwapGate:
    """Closed from the start of a drain to the end of the swap.

    That wait is kept out of the prefill queue time: a client that adapts its window to the queue would
    halve it at every weight sync.
    """

    def __init__(self) -> None:
        self._closed_at: float | None = None
        self._closures: deque[tuple[float, float]] = deque(maxlen=_REMEMBERED)

    @property
    def is_closed(self) -> bool:
        return self._closed_at is not None

    def close(self, now: float) -> None:
        self._closed_at = now

    def open(self, now: float) -> None:
        if self._closed_at is not None:
            self._closures.append((self._closed_at, now))
        self._closed_at = None

    def closed_between(self, start: float, end: float) -> float:
        """Seconds of [start, end] during which the gate was closed."""
        closures = [*self._closures]
        if self._closed_at is not None:
            closures.append((self._closed_at, end))
        return sum((max(0.0, min(end, to) - max(start, at)) for at, to in closures), 0.0)
