"""Training runs and sessions of the root plane, as their owner looks at them."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass

from homefire.control.db import tables, tinker_tables
from homefire.control.db.database import Database
from homefire.control.db.rows import JobRow, SamplingSessionRow, TinkerRunRow, TinkerSessionRow
from homefire.control.job_activity import Activities
from homefire.control.paging import Window
from homefire.control.tinker.checkpoints import Checkpoints
from homefire.control.tinker.runs import find_run
from homefire.control.tinker.sessions import find_session
from homefire.wire.errors import InvalidArgument
from homefire.wire.manifest import CheckpointFamily, Manifest
from homefire.wire.resources import JobState

LONGEST_PROJECT = 128


@dataclass(frozen=True)
class RunView:
    """A run, and what is known of it beside its row."""

    row: TinkerRunRow
    last_request_at: float
    corrupted: bool
    """Its trainer failed for good."""
    last_state: Manifest | None
    last_snapshot: Manifest | None


@dataclass(frozen=True)
class SessionView:
    row: TinkerSessionRow
    runs: list[TinkerRunRow]
    samplers: list[SamplingSessionRow]


@dataclass(frozen=True)
class Listing:
    database: Database
    checkpoints: Checkpoints
    activities: Activities

    async def runs(
        self, account: str, window: Window, *, project_id: str | None = None
    ) -> tuple[list[RunView], int]:
        """Those of the window, newest first, and how many there are in all."""

        def work(connection: sqlite3.Connection) -> tuple[list[TinkerRunRow], set[str]]:
            sessions = tinker_tables.sessions(connection, account)
            inside = {s.id for s in sessions if project_id in (None, s.project_id)}
            return tinker_tables.runs(connection, account), inside

        rows, inside = await self.database.transact(work)
        rows = [row for row in reversed(rows) if row.session in inside]
        return await self._views(window.cut(rows)), len(rows)

    async def run(self, account: str, run_id: str) -> RunView:
        """NotFound, also for another account's."""
        row = await self.database.transact(lambda c: find_run(c, account, run_id))
        return (await self._views([row]))[0]

    async def sessions(self, account: str, window: Window) -> list[TinkerSessionRow]:
        """Newest first."""
        rows = await self.database.transact(lambda c: tinker_tables.sessions(c, account))
        return window.cut(rows[::-1])

    async def session(self, account: str, session_id: str) -> SessionView:
        """NotFound, also for another account's."""
        return await self.database.transact(lambda c: _session_view(c, account, session_id))

    async def with_checkpoints(
        self, sessions: Sequence[TinkerSessionRow]
    ) -> list[tuple[TinkerSessionRow, list[Manifest]]]:
        """Each with what its runs have saved."""
        ids = [session.id for session in sessions]
        runs = await self.database.transact(
            lambda c: {id: tinker_tables.runs_of_session(c, id) for id in ids}
        )
        return [(s, await self.checkpoints.of_runs(runs[s.id])) for s in sessions]

    async def assign_project(self, account: str, session_id: str, project_id: str) -> None:
        """A project is a name that sessions share; it needs no making."""
        if not 0 < len(project_id) <= LONGEST_PROJECT:
            raise InvalidArgument(
                "project_id is missing or too long",
                hint=f"use 1 to {LONGEST_PROJECT} characters",
                field="project_id",
            )

        def work(connection: sqlite3.Connection) -> None:
            find_session(connection, account, session_id)
            tinker_tables.assign_project(connection, session_id, project_id)

        await self.database.transact(work)

    async def _views(self, rows: Sequence[TinkerRunRow]) -> list[RunView]:
        jobs = await self.database.transact(
            lambda c: {row.job: tables.job(c, row.job) for row in rows}
        )
        manifests = await self.checkpoints.of_runs(list(rows))

        def work() -> list[RunView]:
            return [self._view(row, jobs[row.job], manifests) for row in rows]

        return await asyncio.to_thread(work)

    def _view(self, row: TinkerRunRow, job: JobRow | None, manifests: list[Manifest]) -> RunView:
        """`manifests` are newest first. Blocks on the disk."""
        own = [m for m in manifests if (m.job, m.slot) == (row.job, row.id)]
        busy_at = self.activities.of(row.job).last_at.get(row.id, 0.0)
        return RunView(
            row=row,
            last_request_at=max(row.last_request_at, busy_at),
            corrupted=job is not None and job.state is JobState.FAILED,
            last_state=_newest(own, CheckpointFamily.STATE),
            last_snapshot=_newest(own, CheckpointFamily.SAMPLER),
        )


def _session_view(connection: sqlite3.Connection, account: str, session_id: str) -> SessionView:
    return SessionView(
        find_session(connection, account, session_id),
        tinker_tables.runs_of_session(connection, session_id),
        tinker_tables.sampling_sessions_of_session(connection, session_id),
    )


def _newest(manifests: Sequence[Manifest], family: CheckpointFamily) -> Manifest | None:
    return next((m for m in manifests if m.family is family), None)
