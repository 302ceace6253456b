"""The tables of the root Tinker plane: sessions, training runs, sampling sessions."""

from __future__ import annotations

import sqlite3
from typing import NamedTuple

from homefire.control.db import statements as sql
from homefire.control.db.columns import changed, columns, decoded, every, insert, one
from homefire.control.db.rows import SamplingSessionRow, TinkerRunRow, TinkerSessionRow

Connection = sqlite3.Connection


class UnclosedRuns(NamedTuple):
    """The runs of a finished session in one running job."""

    session: str
    job: str


class LiveSession(NamedTuple):
    """An unfinished session and one of the jobs or samplers that it uses."""

    session: str
    service: str
    heartbeat_at: float


def insert_session(connection: Connection, session: TinkerSessionRow) -> None:
    insert(connection, sql.INSERT_TINKER_SESSION, session, what=f"session {session.id!r}")


def session(connection: Connection, session_id: str) -> TinkerSessionRow | None:
    return one(connection, sql.TINKER_SESSION, (session_id,), TinkerSessionRow)


def sessions(connection: Connection, account: str) -> list[TinkerSessionRow]:
    return every(connection, sql.TINKER_SESSIONS, (account,), TinkerSessionRow)


def touch_session(connection: Connection, session_id: str, *, heartbeat_at: float) -> None:
    values = {"id": session_id, "heartbeat_at": heartbeat_at}
    connection.execute(sql.TOUCH_TINKER_SESSION, values)


def finish_session(
    connection: Connection, session_id: str, *, reason: str, detail: str, now: float
) -> bool:
    """False when it was finished before: the first reason stays."""
    values = {"finished_at": now, "finish_reason": reason, "finish_detail": detail}
    return changed(connection, sql.FINISH_TINKER_SESSION, {**values, "id": session_id})


def assign_project(connection: Connection, session_id: str, project_id: str) -> None:
    connection.execute(sql.ASSIGN_PROJECT, {"id": session_id, "project_id": project_id})


def insert_run(connection: Connection, run: TinkerRunRow) -> None:
    insert(connection, sql.INSERT_TINKER_RUN, run, what=f"training run {run.id!r}")


def run(connection: Connection, run_id: str) -> TinkerRunRow | None:
    return one(connection, sql.TINKER_RUN, (run_id,), TinkerRunRow)


def runs(connection: Connection, account: str) -> list[TinkerRunRow]:
    return every(connection, sql.TINKER_RUNS, (account,), TinkerRunRow)


def runs_of_session(connection: Connection, session_id: str) -> list[TinkerRunRow]:
    return every(connection, sql.TINKER_RUNS_OF_SESSION, (session_id,), TinkerRunRow)


def open_runs(connection: Connection, account: str, *, since: float) -> list[TinkerRunRow]:
    """Of sessions that are not finished and were heard of after `since`."""
    rows = connection.execute(sql.OPEN_TINKER_RUNS, {"account": account, "since": since})
    return [decoded(row, TinkerRunRow) for row in rows]


def touch_run(connection: Connection, run_id: str, *, last_request_at: float) -> None:
    values = {"id": run_id, "last_request_at": last_request_at}
    connection.execute(sql.TOUCH_TINKER_RUN, values)


def unclosed_runs(connection: Connection) -> list[UnclosedRuns]:
    rows = connection.execute(sql.UNCLOSED_TINKER_RUNS)
    return [UnclosedRuns(row["session"], row["job"]) for row in rows]


def close_runs(connection: Connection, *, session: str, job: str, now: float) -> None:
    connection.execute(sql.CLOSE_TINKER_RUNS, {"session": session, "job": job, "now": now})


def live_sessions(connection: Connection, *, since: float) -> list[LiveSession]:
    rows = connection.execute(sql.LIVE_TINKER_SESSIONS, {"since": since})
    return [LiveSession(row["session"], row["service"], row["heartbeat_at"]) for row in rows]


def paths_being_sampled(connection: Connection, *, since: float) -> list[str]:
    return [row["path"] for row in connection.execute(sql.PATHS_BEING_SAMPLED, {"since": since})]


def live_runs(connection: Connection, *, since: float) -> list[str]:
    return [row["run"] for row in connection.execute(sql.LIVE_TINKER_RUNS, {"since": since})]


def insert_sampling_session(connection: Connection, session: SamplingSessionRow) -> None:
    connection.execute(sql.INSERT_SAMPLING_SESSION, columns(session))


def sampling_session(connection: Connection, session_id: str) -> SamplingSessionRow | None:
    return one(connection, sql.SAMPLING_SESSION, (session_id,), SamplingSessionRow)


def sampling_sessions_of_session(
    connection: Connection, session_id: str
) -> list[SamplingSessionRow]:
    return every(connection, sql.SAMPLING_SESSIONS_OF_SESSION, (session_id,), SamplingSessionRow)
