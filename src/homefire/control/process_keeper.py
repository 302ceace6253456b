"""Starting and stopping the processes of rows, whatever they are processes of."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

from homefire.control.db.rows import Supervision
from homefire.control.supervision import after_death, after_start
from homefire.foundation.clock import Clock
from homefire.foundation.failpoints import failpoint
from homefire.launch import Launcher, ProcessRecord, ProcessSpec
from homefire.wire.errors import HomefireError

log = logging.getLogger(__name__)
_TAIL_LINES = 12

Change = Callable[[Supervision], Supervision]
"""What an act does to the supervision of its row, applied to the row as it is by then."""


@dataclass(frozen=True)
class KeeperConfig:
    """How patient control is with its processes."""

    stop_grace_s: float = 60.0
    """Between SIGTERM and SIGKILL: a trainer writes a recovery point meanwhile."""
    status_pace_s: float = 1.0
    """How often a process is asked while nothing is expected of it."""


class ProcessKeeper:
    """Acts on processes and says what that does to their rows; it writes no row itself."""

    def __init__(
        self, *, launcher: Launcher, clock: Clock, config: KeeperConfig, wake: Callable[[], None]
    ) -> None:
        self._launcher = launcher
        self._clock = clock
        self._config = config
        self._wake = wake
        self._stopping: dict[str, asyncio.Task[None]] = {}

    def intend(self, spec: ProcessSpec) -> Change:
        """To be written before `start`, so that a start that is not written down can be found."""
        record = spec.record(process=None, boot="", started_at=self._clock.now())
        return lambda supervision: after_start(supervision, record)

    async def start(self, spec: ProcessSpec) -> Change:
        try:
            record = await self._launcher.start(spec)
        except HomefireError as exc:
            log.warning("%s was not started: %s", spec.name, exc)
            return self._death(str(exc))
        failpoint("control.after_start_before_record")
        log.info("%s runs as %s", spec.name, record.process)
        return lambda supervision: after_start(supervision, record)

    async def adopt(self, supervision: Supervision) -> Change | None:
        """Finds a process whose start was intended and not written down; None where none was."""
        record = supervision.process
        if record is None or record.process is not None:
            return None
        found = await self._launcher.find(record)
        if found is None:
            return self._death("was not started: control was killed meanwhile")
        return lambda supervision: after_start(supervision, found)

    async def bury(self, supervision: Supervision, failure: str) -> Change:
        """The process has ended; the end of its log goes into the reason."""
        if supervision.process is None:
            return self._death(failure)
        lines = await self._launcher.logs(supervision.process, lines=_TAIL_LINES)
        return self._death(":\n".join([failure, "\n".join(lines)]) if lines else failure)

    def stop_in_background(self, supervision: Supervision) -> None:
        """Once per process: asked again while it is stopping, this does nothing."""
        record = supervision.process
        if record is None:
            return
        known = self._stopping.get(record.nonce)
        if known is None or known.done():
            task = asyncio.create_task(self._stop_and_wake(record))
            self._stopping[record.nonce] = task
            task.add_done_callback(lambda _: self._stopping.pop(record.nonce, None))

    async def stop(self, record: ProcessRecord) -> None:
        exit_ = await self._launcher.stop(record, grace_s=self._config.stop_grace_s)
        log.info("%s %s", record.name, exit_)

    async def all_stopped(self) -> None:
        """Returns when everything that is being stopped in the background has ended."""
        await asyncio.gather(*self._stopping.values())

    async def _stop_and_wake(self, record: ProcessRecord) -> None:
        await self.stop(record)
        self._wake()

    def _death(self, failure: str) -> Change:
        now = self._clock.now()
        return lambda supervision: after_death(supervision, now=now, failure=failure)
