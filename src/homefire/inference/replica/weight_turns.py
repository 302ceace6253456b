"""Full weights taken in turns: requests for the same weights run together, the others wait.

    enter(X) ──X serves and nobody waits──▶ inside
       └── else waits; when the last one inside leaves: swap to the longest waiting, let all of its in

Those who come for X while others wait for Y wait for their next turn, so that neither starves, and a turn
lets in everyone who waits for it, so that two alternating clients cost two swaps and not one per request.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Protocol

from homefire.wire.errors import HomefireError
from homefire.wire.internal import HotLoadRequest


class FullWeights(Protocol):
    """Whoever swaps them. `HotLoader` does."""

    def is_serving(self, wanted: HotLoadRequest) -> bool: ...

    async def load(self, wanted: HotLoadRequest) -> None:
        """Returns when it serves; HomefireError when it does not."""
        ...


class WeightTurns:
    """Owned by one event loop."""

    def __init__(self, weights: FullWeights) -> None:
        self._weights = weights
        self._inside = 0
        self._waiting: dict[HotLoadRequest, list[asyncio.Future[None]]] = {}
        """Longest waiting first."""
        self._changing: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def turn(self, wanted: HotLoadRequest) -> AsyncIterator[None]:
        """While inside, no other request changes the full weights. Raises why they were not loaded."""
        if self._changing is None and not self._waiting and self._weights.is_serving(wanted):
            self._inside += 1
        else:
            await self._wait(wanted)
        try:
            yield
        finally:
            self._leave()

    async def stop(self) -> None:
        """Those who wait are left to whoever stops them."""
        if self._changing is not None:
            self._changing.cancel()
            await asyncio.wait([self._changing])

    async def _wait(self, wanted: HotLoadRequest) -> None:
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(wanted, []).append(mine)
        self._change_if_empty()
        try:
            await mine
        except asyncio.CancelledError:
            self._give_up(wanted, mine)
            raise

    def _give_up(self, wanted: HotLoadRequest, mine: asyncio.Future[None]) -> None:
        if mine.done() and not mine.cancelled():  # answered and cancelled at the same moment
            if mine.exception() is None:
                self._leave()
            return
        others = self._waiting.get(wanted, [])
        if mine in others:
            others.remove(mine)
            if not others:
                del self._waiting[wanted]

    def _leave(self) -> None:
        self._inside -= 1
        self._change_if_empty()

    def _change_if_empty(self) -> None:
        if self._inside == 0 and self._waiting and self._changing is None:
            self._changing = asyncio.create_task(self._change())

    async def _change(self) -> None:
        try:
            while self._waiting and self._inside == 0:
                wanted = next(iter(self._waiting))
                await self._let_in(wanted, self._load(wanted))
        finally:
            self._changing = None

    async def _load(self, wanted: HotLoadRequest) -> None:
        if not self._weights.is_serving(wanted):
            await self._weights.load(wanted)

    async def _let_in(self, wanted: HotLoadRequest, loading: Awaitable[None]) -> None:
        error: HomefireError | None = None
        try:
            await loading
        except HomefireError as failure:
            error = failure
        for waiting in self._waiting.pop(wanted, []):
            if waiting.cancelled():  # it is about to give up, and finds itself gone
                continue
            if error is not None:
                waiting.set_exception(error)
            else:
                self._inside += 1
                waiting.set_result(None)
