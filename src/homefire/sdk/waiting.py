"""Waiting for a server-side state by asking again: at once, after 50 ms, then ever more rarely."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import httpx

from homefire.foundation.clock import Clock, SystemClock
from homefire.sdk.progress import Progress

TRANSIENT = frozenset({408, 429, 500, 502, 503, 504})
"""HTTP statuses that may be gone at the next try."""
_FIRST_DELAY_S = 0.05
_GROWTH = 1.5

Found = TypeVar("Found")
Check = Callable[[Progress], Found | None]
"""Asks once. None means not yet; the check tells `Progress` what it saw."""


@dataclass(frozen=True)
class Waiter:
    """Owns time for every wait of the SDK; tests give their own clock and sleep."""

    clock: Clock = field(default_factory=SystemClock)
    sleep: Callable[[float], None] = time.sleep

    def until(
        self, check: Check[Found], *, what: str, timeout_s: float, interval_s: float
    ) -> Found:
        """The first answer of `check` that is not None.

        The first check comes at once, the next after 50 ms, then the pause grows by half up to
        `interval_s`. A broken connection and a transient HTTP status count as "not yet". Blocks
        up to `timeout_s` seconds, then raises TimeoutError with the last state seen.
        """
        delay_s = _FIRST_DELAY_S
        with Progress(what, timeout_s=timeout_s, clock=self.clock) as progress:
            while True:
                found = _ask(check, progress)
                if found is not None:
                    return found
                if not progress.left_s:
                    raise TimeoutError(
                        f"{what}: not done after {timeout_s:g} s; last seen: {progress.state}"
                    )
                self.sleep(min(delay_s, progress.left_s))
                delay_s = min(delay_s * _GROWTH, max(interval_s, _FIRST_DELAY_S))


def _ask(check: Check[Found], progress: Progress) -> Found | None:
    try:
        return check(progress)
    except httpx.HTTPStatusError as exc:
        if exc.response.status_code not in TRANSIENT:
            raise
        progress.update(str(exc))
        return None
    except httpx.TransportError as exc:
        progress.update(f"no answer from the server ({type(exc).__name__})")
        return None
