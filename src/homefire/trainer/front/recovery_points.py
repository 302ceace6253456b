"""When the state of the engine is saved, where, and what may be deleted after that.

A point is a directory that the engine wrote and a record in the journal that says so; a directory
without a record is left over from a crash. Two points are kept, and the journal behind the older.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Awaitable, Coroutine
from typing import Any

from homefire.foundation.clock import Clock
from homefire.foundation.disk import SYSTEM, Disk
from homefire.foundation.durable import make_directory, remove_tree
from homefire.foundation.events import EventLog
from homefire.foundation.failpoints import failpoint
from homefire.trainer.front.journal import Journal
from homefire.trainer.front.live_model import LiveModel
from homefire.trainer.front.records import PointTaken
from homefire.trainer.front.recovery import recovery_directory
from homefire.trainer.front.sessions import Ledger
from homefire.trainer.front.trimming import Trimming
from homefire.wire.engine import RecoverySaved
from homefire.wire.specs import TrainerSpec

_WRITE_SHARE = 20
"""Writing points takes at most one part in so many of the time."""

_SHORTEST_INTERVAL = 2
"""Times the time that writing the last one took, between points that come early."""


class RecoveryPoints:
    def __init__(
        self,
        spec: TrainerSpec,
        clock: Clock,
        ledger: Ledger,
        journal: Journal,
        events: EventLog,
        trimming: Trimming,
        disk: Disk = SYSTEM,
    ) -> None:
        self._spec = spec
        self._clock = clock
        self._ledger = ledger
        self._journal = journal
        self._trimming = trimming
        self._events = events
        self._disk = disk
        self._directory = recovery_directory(spec)
        self._taken_at = clock.monotonic()
        self._write_s = 0.0
        self._num_bytes_before = 0
        """Written to the journal when the newest point was begun."""
        self._is_writing = False

    @property
    def is_dirty(self) -> bool:
        """Something completed since the newest point."""
        points = self._ledger.points
        return self._ledger.position > (points[-1].position if points else 0)

    @property
    def due_in_s(self) -> float | None:
        """Seconds until the next point should be taken; None while nothing has changed, or one is being
        written."""
        if not self.is_dirty or self._is_writing:
            return None
        interval_s = max(self._spec.recovery_interval_s, _WRITE_SHARE * self._write_s)
        if self._much_to_replay:
            interval_s = min(interval_s, _SHORTEST_INTERVAL * self._write_s)
        return max(0.0, self._taken_at + interval_s - self._clock.monotonic())

    @property
    def _much_to_replay(self) -> bool:
        """The journal would outgrow its cap with what two points and the time between them need."""
        num_bytes = self._journal.num_bytes_written - self._num_bytes_before
        return num_bytes > self._spec.journal_cap_bytes // 4

    async def begin(self, model: LiveModel) -> Coroutine[Any, Any, None]:
        """Between operations. What it returns is to run when every save before it has ended; only then the
        point counts. Raises HomefireError, as that may, when it cannot be written; the old ones stay.
        """
        started = self._taken_at = self._clock.monotonic()
        self._num_bytes_before = self._journal.num_bytes_written
        position, floor = self._ledger.position, self._ledger.floor(self._journal.segment)
        name = f"{position:012d}-{secrets.token_hex(3)}"
        make_directory(self._directory, disk=self._disk)
        save = await model.begin_recovery(self._directory / name)
        self._is_writing = True
        return self._end(save, name, position, floor, started)

    async def _end(
        self,
        save: Awaitable[RecoverySaved],
        name: str,
        position: int,
        floor: int,
        started: float,
    ) -> None:
        try:
            size_bytes = (await save).size_bytes
            failpoint("points.before_record")
            at = self._clock.now()
            await self._journal.append(PointTaken(name=name, position=position, floor=floor, at=at))
            failpoint("points.before_roll")
            await self._journal.rotate(self._ledger.snapshot)
        finally:
            self._is_writing = False
        self._write_s = self._clock.monotonic() - started
        failpoint("points.before_trim")
        await self.delete_leftovers()
        self._events.append(
            "recovery_point", name=name, size_bytes=size_bytes, seconds=round(self._write_s, 3)
        )

    async def delete_leftovers(self) -> None:
        """Directories that no kept point names, and segments that nothing needs."""
        await asyncio.to_thread(self._delete, {point.name for point in self._ledger.points})
        await self._trimming.trim()

    def _delete(self, kept: set[str]) -> None:
        with contextlib.suppress(FileNotFoundError):
            for name in self._disk.listdir(self._directory):
                if name not in kept:
                    self._remove(name)

    def _remove(self, name: str) -> None:
        """What cannot be removed now is tried again after the next point."""
        with contextlib.suppress(OSError):
            remove_tree(self._directory / name, disk=self._disk)
