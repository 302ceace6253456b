"""How long requests are held behind a number that does not come.

Generous, since a custom loss legitimately takes its client a while between two numbers.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from homefire.foundation.clock import Clock
from homefire.trainer.front.records import Handle
from homefire.trainer.front.sessions import Ledger
from homefire.wire.errors import StorageFailed

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Gap:
    missing: int
    since: float


class GapTimers:
    """One timer for the earliest deadline. `expire(handle, missing)` is awaited for each gap."""

    def __init__(
        self,
        clock: Clock,
        ledger: Ledger,
        expire: Callable[[str, int], Awaitable[None]],
        *,
        timeout_s: float,
    ) -> None:
        self._clock = clock
        self._ledger = ledger
        self._expire = expire
        self._timeout_s = timeout_s
        self._gaps: dict[str, _Gap] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None

    def watch_all(self) -> None:
        """After a start: held requests get the whole time again."""
        for handle in self._ledger.handles.values():
            self.watch(handle)

    def watch(self, handle: Handle) -> None:
        """To be called whenever a request of the handle has arrived."""
        missing, gap = handle.order.missing, self._gaps.get(handle.model_id)
        if missing is None:
            self._gaps.pop(handle.model_id, None)
        elif gap is None or gap.missing != missing:
            self._gaps[handle.model_id] = _Gap(missing, self._clock.monotonic())
            self._arm()

    async def expire_due(self) -> None:
        """Gives up what is overdue by the clock."""
        due_before = self._clock.monotonic() - self._timeout_s
        overdue = [(m, gap) for m, gap in self._gaps.items() if gap.since <= due_before]
        for model_id, gap in overdue:
            if self._ledger.handles[model_id].order.missing == gap.missing:
                await self._try_expire(model_id, gap.missing)
            else:
                del self._gaps[model_id]

    async def _try_expire(self, model_id: str, missing: int) -> None:
        """When the journal cannot be written, the gap gets the whole time again."""
        try:
            await self._expire(model_id, missing)
        except StorageFailed as error:
            log.warning("the gap before %s of %s stays: %s", missing, model_id, error)
            self._gaps[model_id] = _Gap(missing, self._clock.monotonic())
        else:
            self._gaps.pop(model_id, None)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        earliest = min((gap.since for gap in self._gaps.values()), default=None)
        if earliest is None:
            self._timer = None
            return
        delay_s = max(0.0, earliest + self._timeout_s - self._clock.monotonic())
        self._timer = asyncio.get_running_loop().call_later(delay_s, self._ring)

    def _ring(self) -> None:
        self._task = asyncio.create_task(self._expire_and_arm())

    async def _expire_and_arm(self) -> None:
        await self.expire_due()
        self._arm()
