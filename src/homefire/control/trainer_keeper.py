"""Does what is decided about jobs and their trainers."""

from __future__ import annotations

import logging
import sqlite3

from homefire.control.capacity import Capacity
from homefire.control.db import tables
from homefire.control.db.database import Database
from homefire.control.db.rows import JobRow
from homefire.control.lifecycle import (
    JOB_ENDED,
    Admit,
    Advance,
    Bury,
    JobAction,
    JobEvent,
    Launch,
    MarkReady,
    Stop,
    WaitUntil,
    job_after,
)
from homefire.control.observations import Observations
from homefire.control.process_keeper import Change, ProcessKeeper
from homefire.control.processes import ProcessPlan
from homefire.control.supervision import after_clean_stop, after_ready
from homefire.control.world import ledger_of
from homefire.foundation.clock import Clock

log = logging.getLogger(__name__)


class TrainerKeeper:
    """Owned by the reconciler."""

    def __init__(
        self,
        *,
        database: Database,
        keeper: ProcessKeeper,
        observations: Observations,
        plan: ProcessPlan,
        capacity: Capacity,
        clock: Clock,
    ) -> None:
        self._database = database
        self._keeper = keeper
        self._observations = observations
        self._plan = plan
        self._capacity = capacity
        self._clock = clock

    async def act(self, job: JobRow, action: JobAction) -> bool:
        """Says whether anything changed, so that it has to be decided again."""
        now = self._clock.now()
        match action:
            case Advance(event, message):
                return await self._advance(job, event, message)
            case Admit():
                return await self._database.transact(
                    lambda c: admit_if_room(c, job, self._capacity, now=now)
                )
            case Launch():
                await self._launch(job)
            case Stop():
                self._observations.expect_end_of_trainer(job.id)
                self._keeper.stop_in_background(job.supervision)
                return False
            case Bury(failure):
                await self._write(job, await self._keeper.bury(job.supervision, failure))
            case MarkReady():
                await self._write(job, lambda supervision: after_ready(supervision, now=now))
            case WaitUntil():
                return False
        return True

    async def adopt(self, job: JobRow) -> None:
        """After a control plane that was killed; see `ProcessKeeper.adopt`."""
        change = await self._keeper.adopt(job.supervision)
        if change is not None:
            await self._write(job, change)

    async def stop(self, job: JobRow) -> None:
        """A clean stop: the row stays as it is, without a process."""
        if job.supervision.process is not None:
            await self._keeper.stop(job.supervision.process)
            await self._write(job, lambda _: after_clean_stop())

    async def _advance(self, job: JobRow, event: JobEvent, message: str) -> bool:
        to, now = job_after(job, event), self._clock.now()
        completed_at = now if to in JOB_ENDED else None

        def work(connection: sqlite3.Connection) -> bool:
            return tables.advance_job(
                connection, job, to, message=message, now=now, completed_at=completed_at
            )

        log.info("job %s: %s -> %s %s", job.id, job.state, to, message)
        return await self._database.transact(work)

    async def _launch(self, job: JobRow) -> None:
        spec = self._plan.trainer(job)
        intend = self._keeper.intend(spec)

        def intend_unless_moved(connection: sqlite3.Connection) -> bool:
            fresh = tables.job(connection, job.id)
            if fresh is None or fresh.state is not job.state or fresh.supervision.process:
                return False
            tables.supervise_job(connection, job.id, intend(fresh.supervision))
            return True

        if await self._database.transact(intend_unless_moved):
            await self._write(job, await self._keeper.start(spec))

    async def _write(self, job: JobRow, change: Change) -> None:
        def work(connection: sqlite3.Connection) -> None:
            fresh = tables.job(connection, job.id)
            if fresh is not None:
                tables.supervise_job(connection, job.id, change(fresh.supervision))

        await self._database.transact(work)


def admit_if_room(
    connection: sqlite3.Connection, job: JobRow, capacity: Capacity, *, now: float
) -> bool:
    """Moves a PENDING job on, or notes what it waits for. Says whether its row changed."""
    if job.supervision.process is not None:
        reason = "waiting for its last trainer to end"
    else:
        reason = ledger_of(connection, capacity).shortfall(job.config.need)
    if reason is None:
        to = job_after(job, JobEvent.ADMITTED)
        return tables.advance_job(connection, job, to, message="", now=now, completed_at=None)
    return reason != job.message and tables.note_job(connection, job, reason, now=now)
