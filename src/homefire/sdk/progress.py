"""Shows that a long wait is alive: one line that is rewritten, or one log record per change."""

from __future__ import annotations

import logging
import math
import sys
from types import TracebackType
from typing import Self, TextIO

from homefire.foundation.clock import Clock, SystemClock

log = logging.getLogger(__name__)
_QUIET_S = 1.0
"""Waits shorter than this show nothing on a terminal."""


class Progress:
    """The state of one wait. On a terminal `what: state (12 s)` is rewritten in place; elsewhere
    (notebooks, files) each *change* of the state is one `logging.info`, never one per poll.

    A context manager: leaving it ends the terminal's line.
    """

    def __init__(
        self,
        what: str,
        *,
        timeout_s: float = math.inf,
        stream: TextIO | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._what = what
        self._stream = stream or sys.stderr
        self._clock = clock or SystemClock()
        self._started = self._clock.monotonic()
        self._deadline = self._started + timeout_s
        self._is_terminal = self._stream.isatty()
        self._width = 0
        self.state = ""

    @property
    def left_s(self) -> float:
        """Seconds until the wait gives up; at least 0."""
        return max(0.0, self._deadline - self._clock.monotonic())

    def update(self, state: str) -> None:
        changed, self.state = state != self.state, state
        if self._is_terminal:
            self._rewrite()
        elif changed:
            log.info("%s: %s", self._what, state)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._width:
            self._stream.write("\r" + " " * self._width + "\r")
            self._stream.flush()

    def _rewrite(self) -> None:
        elapsed = self._clock.monotonic() - self._started
        if elapsed < _QUIET_S:
            return
        line = f"{self._what}: {self.state} ({elapsed:.0f} s)"[:110]
        self._stream.write("\r" + line.ljust(self._width))
        self._stream.flush()
        self._width = len(line)
