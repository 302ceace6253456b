"""Large bodies, a few at a time: memory stays bounded, and heartbeats are answered beside them.

The rest wait unread, which the client's connection feels as a slow upload: nothing is refused, since
accepted training calls must not fail for being many.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response

from homefire.trainer.front.future_calls import OFF_LOOP_ABOVE

MAX_LARGE_BODIES = 8
"""In memory at once, until they are on disk. Enough for one group commit to serve several."""
MAX_PARSING = 1
"""Parsing holds the interpreter for milliseconds at a time: of two that parse, the event loop waits for
both in turn, and nothing is ready sooner."""

Value = TypeVar("Value")
Call = Callable[[Request], Awaitable[Response]]


class Intake:
    """Owned by one event loop; first come, first served."""

    def __init__(self) -> None:
        self._held = asyncio.Semaphore(MAX_LARGE_BODIES)
        self._parsing = asyncio.Semaphore(MAX_PARSING)

    def bounded(self, call: Call) -> Call:
        """A call whose body may be large. A body of unknown length counts as one."""

        async def endpoint(request: Request) -> Response:
            if int(request.headers.get("content-length", OFF_LOOP_ABOVE + 1)) <= OFF_LOOP_ABOVE:
                return await call(request)
            async with self._held:
                return await call(request)

        return endpoint

    async def parse(self, work: Callable[[], Value], num_bytes: int) -> Value:
        if num_bytes <= OFF_LOOP_ABOVE:
            return work()
        async with self._parsing:
            return await asyncio.to_thread(work)
