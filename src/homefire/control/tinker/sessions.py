"""Sessions of the root plane: who is there, since when, and how it ended."""

from __future__ import annotations

import secrets
import sqlite3
from dataclasses import dataclass, field

from homefire.control.db import tinker_tables
from homefire.control.db.database import Database
from homefire.control.db.rows import TinkerRunRow, TinkerSessionRow
from homefire.foundation.clock import Clock
from homefire.wire.errors import FailedPrecondition, InvalidArgument, NotFound
from homefire.wire.pooled import SESSION_PREFIX
from homefire.wire.records import RunReport
from homefire.wire.tinker import CreateSession

FINISH_REASONS = ("success", "errored", "interrupted")
HEARTBEAT_ROW_S = 60.0
"""A heartbeat is written down at most this often; clients send one every 10 s."""
_REPORTED_S = 24 * 3600.0
"""Sessions of clients that vanished without a word are shown for so long."""


@dataclass(frozen=True)
class Sessions:
    database: Database
    clock: Clock
    _heard: dict[str, float] = field(default_factory=dict[str, float])
    """Unix time of the last heartbeat of each session, newer than its row by up to a minute."""

    async def create(self, account: str, request: CreateSession) -> TinkerSessionRow:
        now = self.clock.now()
        session = TinkerSessionRow(
            id=f"{SESSION_PREFIX}{secrets.token_hex(8)}",
            account=account,
            tags=request.tags or [],
            user_metadata=request.user_metadata or {},
            display_name=request.display_name,
            project_id=request.project_id,
            sdk_version=request.sdk_version,
            created_at=now,
            heartbeat_at=now,
        )
        await self.database.transact(lambda c: tinker_tables.insert_session(c, session))
        return session

    async def get(self, account: str, session_id: str) -> TinkerSessionRow:
        """NotFound, also for another account's session."""
        return await self.database.transact(lambda c: find_session(c, account, session_id))

    async def heartbeat(self, account: str, session_id: str) -> TinkerSessionRow:
        """The session as it is; a finished one hears nothing any more."""
        session = await self.get(account, session_id)
        if session.finished_at is None:
            now = self.clock.now()
            self._heard[session_id] = now
            if now - session.heartbeat_at >= HEARTBEAT_ROW_S:
                await self.database.transact(
                    lambda c: tinker_tables.touch_session(c, session_id, heartbeat_at=now)
                )
        return session

    async def finish(self, account: str, session_id: str, *, reason: str, detail: str) -> None:
        """The first reason stays; a later one changes nothing."""
        if reason not in FINISH_REASONS:
            raise InvalidArgument(
                f"reason.type {reason!r} is not one of {', '.join(FINISH_REASONS)}",
                field="reason.type",
            )
        now = self.clock.now()

        def work(connection: sqlite3.Connection) -> None:
            find_session(connection, account, session_id)
            tinker_tables.finish_session(
                connection, session_id, reason=reason, detail=detail, now=now
            )

        await self.database.transact(work)
        self._heard.pop(session_id, None)

    async def open_runs(self, account: str) -> list[RunReport]:
        """For a person to look at."""
        now = self.clock.now()

        def work(connection: sqlite3.Connection) -> list[RunReport]:
            runs = tinker_tables.open_runs(connection, account, since=now - _REPORTED_S)
            return [self._report(find_session(connection, account, r.session), r) for r in runs]

        return await self.database.transact(work)

    def _report(self, session: TinkerSessionRow, run: TinkerRunRow) -> RunReport:
        heard = self.last_heard(session.id, session.heartbeat_at)
        return RunReport(
            run=run.id,
            session_name=session.display_name,
            job=run.job,
            base_model=run.base_model,
            lora_rank=run.lora_rank,
            silent_s=self.clock.now() - heard,
        )

    def last_heard(self, session_id: str, heartbeat_at: float) -> float:
        """`heartbeat_at` is what the session's row says."""
        return max(heartbeat_at, self._heard.get(session_id, 0.0))


def find_session(connection: sqlite3.Connection, account: str, session_id: str) -> TinkerSessionRow:
    session = tinker_tables.session(connection, session_id)
    if session is None or session.account != account:
        raise NotFound(
            f"session {session_id!r} does not exist in account {account!r}",
            hint="create one with create_session (a new ServiceClient does)",
            field="session_id",
        )
    return session


def find_open_session(
    connection: sqlite3.Connection, account: str, session_id: str
) -> TinkerSessionRow:
    """FailedPrecondition for a finished session: nothing new begins in it."""
    session = find_session(connection, account, session_id)
    if session.finished_at is not None:
        raise FailedPrecondition(
            f"session {session_id} was finished ({session.finish_reason})",
            hint="create a new ServiceClient; saved checkpoints can be loaded there",
            field="session_id",
        )
    return session
