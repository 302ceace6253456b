"""Saves whose bytes are taken and that are not durable yet: training goes on meanwhile.

taken (`SaveTaken`: its place in history) ──▶ durable or failed (`SaveEnded`: the future resolves)

What the engine writes in order ends here in order, recovery points too: when a point counts, every save
before it has ended. A save that is only taken when its engine dies is done again by the replay.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from homefire.foundation.clock import Clock
from homefire.trainer.front.engine_process import EngineDied
from homefire.trainer.front.operation_events import OperationEvents
from homefire.trainer.front.outcome import Outcome, failed
from homefire.trainer.front.records import Record, SaveEnded, encode_result
from homefire.trainer.front.sessions import Request
from homefire.wire.errors import HomefireError, InternalError, StorageFailed

log = logging.getLogger(__name__)


class SavesInFlight:
    """Owned by one event loop."""

    def __init__(
        self,
        clock: Clock,
        append: Callable[[Record], Awaitable[None]],
        events: OperationEvents,
    ) -> None:
        self._clock = clock
        self._append = append
        self._events = events
        self._endings: set[asyncio.Task[None]] = set()
        self._last: asyncio.Task[None] | None = None

    def follow(
        self, request: Request, outcome: asyncio.Future[Outcome], *, step: int, started: float
    ) -> None:
        """Its end is recorded when it comes. `step` and `started` are those of the taking."""
        outcome.add_done_callback(_heard)
        self.chain(self._end(request, outcome, step=step, started=started))

    def chain(self, ending: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Runs behind all that were chained before."""
        task = asyncio.create_task(self._behind(self._last, ending))
        self._last = task
        self._endings.add(task)
        task.add_done_callback(self._endings.discard)
        task.add_done_callback(_heard)
        return task

    async def settled(self) -> None:
        """Everything that was taken has ended, or its engine has died."""
        while self._endings:
            await asyncio.wait(self._endings)

    async def end(self, request: Request, outcome: Outcome, *, step: int, started: float) -> None:
        """Records what became of a save."""
        await self._append(
            SaveEnded(
                request_id=request.request_id,
                result=encode_result(outcome.result),
                ok=outcome.error is None,
                at=self._clock.now(),
            )
        )
        ms = 1000 * (self._clock.monotonic() - started)
        self._events.tell(request, outcome, step=step, ms=ms)

    async def _end(
        self, request: Request, outcome: Awaitable[Outcome], *, step: int, started: float
    ) -> None:
        try:
            await self.end(request, await _found(request, outcome), step=step, started=started)
        except EngineDied:
            log.info("save %s is done again by the replay", request.request_id)
        except StorageFailed as error:
            log.error("the end of save %s is not recorded: %s", request.request_id, error)

    async def _behind(
        self, before: asyncio.Task[None] | None, ending: Coroutine[Any, Any, None]
    ) -> None:
        try:
            if before is not None:
                await asyncio.wait({before})
            await ending
        finally:
            ending.close()


def _heard(ended: asyncio.Future[Any]) -> None:
    """Whoever waits for it hears of its error; nobody may be left to wait."""
    if not ended.cancelled():
        ended.exception()


async def _found(request: Request, outcome: Awaitable[Outcome]) -> Outcome:
    try:
        return await outcome
    except HomefireError as error:
        return failed(error)
    except EngineDied:
        raise
    except Exception as exc:
        log.exception("save %s broke", request.request_id)
        error = InternalError(f"{type(exc).__name__}: {exc}", hint="see the trainer's log")
        return failed(error)
