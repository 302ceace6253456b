"""Slots that tasks take and give back, in any event loop and in several threads at once."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from dataclasses import dataclass


@dataclass(eq=False)
class _Waiter:
    loop: asyncio.AbstractEventLoop
    granted: asyncio.Future[None]
    has_slot: bool = False


class Gate:
    """Counts slots in use and queues tasks for them, first come first served."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._in_flight = 0
        self._waiters: deque[_Waiter] = deque()
        self._lock = threading.Lock()

    @property
    def in_flight(self) -> int:
        return self._in_flight

    def try_enter(self) -> bool:
        """Takes a slot if one is free and nobody waits for it."""
        with self._lock:
            is_free = self._in_flight < self._limit and not self._waiters
            self._in_flight += is_free
            return is_free

    async def enter(self) -> None:
        if self.try_enter():
            return
        loop = asyncio.get_running_loop()
        waiter = _Waiter(loop, loop.create_future())
        with self._lock:
            self._waiters.append(waiter)
            self._grant()
        try:
            await waiter.granted
        except asyncio.CancelledError:
            self._abandon(waiter)
            raise

    def leave(self) -> None:
        with self._lock:
            if self._in_flight == 0:
                raise RuntimeError("release() without acquire(): call each once per completion")
            self._in_flight -= 1
            self._grant()

    def resize(self, limit: int) -> None:
        """A smaller limit takes effect as slots are released; nothing in flight is cut."""
        with self._lock:
            self._limit = limit
            self._grant()

    def _abandon(self, waiter: _Waiter) -> None:
        with self._lock:
            if waiter.has_slot:
                self._in_flight -= 1
            else:
                self._waiters.remove(waiter)
            self._grant()

    def _grant(self) -> None:
        while self._waiters and self._in_flight < self._limit:
            waiter = self._waiters.popleft()
            try:
                waiter.loop.call_soon_threadsafe(_resolve, waiter.granted)
            except RuntimeError:
                # Its loop was closed with the task still waiting: it takes no slot along.
                continue
            waiter.has_slot = True
            self._in_flight += 1


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
