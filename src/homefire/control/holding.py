"""Holding a request until what it asks about has settled, instead of letting clients poll.

The unmodified clients sleep 5 to 15 s between polls and time out after 30 s.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from homefire.foundation.versioned import Versioned

Seen = TypeVar("Seen")


class Holder:
    """Looks again after every pass of the reconciler, for at most `hold_s`."""

    def __init__(self, passes: Versioned[int], *, hold_s: float) -> None:
        self._passes = passes
        self._hold_s = hold_s

    def release(self) -> None:
        """Answers everything that is held, and holds nothing any more: the service stops."""
        self._hold_s = 0.0
        self._passes.set(self._passes.get() + 1)

    async def hold(
        self, look: Callable[[], Awaitable[Seen]], *, settled: Callable[[Seen], bool]
    ) -> Seen:
        """What `look` saw last: settled, or as it was when the time was over."""
        started = asyncio.get_running_loop().time()
        while True:
            version = self._passes.version
            seen = await look()
            left_s = started + self._hold_s - asyncio.get_running_loop().time()
            if settled(seen) or left_s <= 0:
                return seen
            await self._passes.wait_beyond(after=version, timeout_s=left_s)
