"""When the state of the engine is saved, where, and what may be deleted after that.

A point is a directory that the engine wrote and a record in the journal that says so; a directory
without a record is left over from a crash. Two points are kept, and the journal behind the older.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets

from homefire.foundation.clock import Clock
from homefire.foundation.disk import SYSTEM, Disk
from homefire.foundation.durable import make_directory, remove_tree
from homefire.foundation.events import EventLog
from homefire.trainer.front.futures import Futures
from homefire.trainer.front.journal import Journal
from homefire.trainer.front.live_model import LiveModel
from homefire.trainer.front.records import PointTaken
from homefire.trainer.front.recovery import recovery_directory
from homefire.trainer.front.sessions import NUM_POINTS_KEPT, Ledger
from homefire.wire.specs import TrainerSpec

_WRITE_SHARE = 20
"""Writing points takes at most one part in so many of the time."""


class RecoveryPoints:
    def __init__(
        self,
        spec: TrainerSpec,
        clock: Clock,
        ledger: Ledger,
        futures: Futures,
        journal: Journal,
        events: EventLog,
        disk: Disk = SYSTEM,
    ) -> None:
        self._spec = spec
        self._clock = clock
        self._ledger = ledger
        self._futures = futures
        self._journal = journal
        self._events = events
        self._disk = disk
        self._directory = recovery_directory(spec)
        self._taken_at = clock.monotonic()
        self._write_s = 0.0

    @property
    def is_dirty(self) -> bool:
        """Something completed since the newest point."""
        points = self._ledger.points
        return self._ledger.position > (points[-1].position if points else 0)

    @property
    def due_in_s(self) -> float | None:
        """Seconds until the next point should be taken; None while nothing has changed."""
        if not self.is_dirty:
            return None
        interval_s = max(self._spec.recovery_interval_s, _WRITE_SHARE * self._write_s)
        return max(0.0, self._taken_at + interval_s - self._clock.monotonic())

    async def take(self, model: LiveModel) -> None:
        """Between operations. Raises HomefireError when it cannot be written; the old ones stay."""
        started = self._taken_at = self._clock.monotonic()
        position = self._ledger.position
        name = f"{position:012d}-{secrets.token_hex(3)}"
        make_directory(self._directory, disk=self._disk)
        size_bytes = await model.save_recovery(self._directory / name)
        floor = self._ledger.floor(self._journal.segment)
        at = self._clock.now()
        await self._journal.append(PointTaken(name=name, position=position, floor=floor, at=at))
        await self._journal.rotate(self._ledger.snapshot)
        self._write_s = self._clock.monotonic() - started
        await self.delete_leftovers()
        self._events.append(
            "recovery_point", name=name, size_bytes=size_bytes, seconds=round(self._write_s, 3)
        )

    async def delete_leftovers(self) -> None:
        """Directories that no kept point names, and segments that nothing needs."""
        points = self._ledger.points
        floor = points[0].floor if len(points) == NUM_POINTS_KEPT else 0
        needed = self._futures.oldest_segment()
        below = floor if needed is None else min(floor, needed)
        below = 0 if self._spec.keep_journal else below
        await asyncio.to_thread(self._delete, {point.name for point in points}, below)

    def _delete(self, kept: set[str], below: int) -> None:
        with contextlib.suppress(FileNotFoundError):
            for name in self._disk.listdir(self._directory):
                if name not in kept:
                    self._remove(name)
        self._journal.trim(below)

    def _remove(self, name: str) -> None:
        """What cannot be removed now is tried again after the next point."""
        with contextlib.suppress(OSError):
            remove_tree(self._directory / name, disk=self._disk)
