from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from homefire.control.db import tables, tinker_tables
from homefire.control.db.database import Database
from homefire.control.db.migrations import MIGRATIONS
from homefire.control.db.rows import (
    BaseModel,
    JobConfig,
    JobRow,
    Need,
    SamplingSessionRow,
    Supervision,
    TinkerRunRow,
    TinkerSessionRow,
)
from homefire.wire.errors import AlreadyExists
from homefire.wire.resources import JobState, TrainerJobRequest
from homefire.wire.specs import TrainerMode

SESSION = TinkerSessionRow(
    id="ts-00000000000000aa",
    account="local",
    tags=["a", "b"],
    user_metadata={"team": "x"},
    display_name="mine",
    sdk_version="0.38.0",
    created_at=1.0,
    heartbeat_at=1.0,
)
RUN = TinkerRunRow(
    id="ts-00000000000000aa:train:0",
    account="local",
    session=SESSION.id,
    model_seq_id=0,
    job="pool-1",
    base_model="tiny",
    lora_rank=32,
    user_metadata={"renderer_name": "role_colon"},
    source_path=None,
    created_at=2.0,
    last_request_at=2.0,
)
SAMPLING = SamplingSessionRow(
    id="pool-1-sampler.01234567",
    account="local",
    session=SESSION.id,
    seq_id=0,
    sampler="pool-1-sampler",
    base_model="tiny",
    model_path=None,
    created_at=3.0,
)
JOB = JobRow(
    id="pool-1",
    account="local",
    state=JobState.PENDING,
    message="",
    config=JobConfig(
        request=TrainerJobRequest(),
        training_shape=None,
        base_model=BaseModel(name="t", directory="/t", tokenizer_id="/t", max_context_length=8),
        mode=TrainerMode.LORA,
        lora_rank=0,
        max_context_length=8,
        need=Need(1, 1),
    ),
    supervision=Supervision(),
    created_at=0.0,
    updated_at=0.0,
)


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    opened = Database(tmp_path / "control.sqlite3")
    await opened.open()
    await opened.transact(fill)
    yield opened
    await opened.close()


def fill(connection: sqlite3.Connection) -> None:
    tables.insert_job(connection, JOB)
    tinker_tables.insert_session(connection, SESSION)
    tinker_tables.insert_run(connection, RUN)
    tinker_tables.insert_sampling_session(connection, SAMPLING)


async def test_rows_come_back_as_they_were_written(database: Database) -> None:
    assert await database.transact(lambda c: tinker_tables.session(c, SESSION.id)) == SESSION
    assert await database.transact(lambda c: tinker_tables.run(c, RUN.id)) == RUN
    found = await database.transact(lambda c: tinker_tables.sampling_session(c, SAMPLING.id))
    assert found == SAMPLING


async def test_an_account_sees_its_own_sessions_and_runs(database: Database) -> None:
    assert await database.transact(lambda c: tinker_tables.sessions(c, "local")) == [SESSION]
    assert await database.transact(lambda c: tinker_tables.sessions(c, "other")) == []
    assert await database.transact(lambda c: tinker_tables.runs(c, "local")) == [RUN]
    assert await database.transact(lambda c: tinker_tables.runs(c, "other")) == []


async def test_a_session_knows_its_runs_and_sampling_sessions(database: Database) -> None:
    def work(connection: sqlite3.Connection) -> tuple[list[TinkerRunRow], list[SamplingSessionRow]]:
        runs = tinker_tables.runs_of_session(connection, SESSION.id)
        return runs, tinker_tables.sampling_sessions_of_session(connection, SESSION.id)

    assert await database.transact(work) == ([RUN], [SAMPLING])


async def test_the_first_reason_for_a_sessions_end_stays(database: Database) -> None:
    def finish(connection: sqlite3.Connection, reason: str, now: float) -> bool:
        return tinker_tables.finish_session(
            connection, SESSION.id, reason=reason, detail="d", now=now
        )

    assert await database.transact(lambda c: finish(c, "success", 5.0))
    assert not await database.transact(lambda c: finish(c, "errored", 6.0))
    row = await database.transact(lambda c: tinker_tables.session(c, SESSION.id))
    assert row == msgspec.structs.replace(
        SESSION, finished_at=5.0, finish_reason="success", finish_detail="d"
    )


async def test_a_heartbeat_never_goes_back_and_none_follows_the_end(database: Database) -> None:
    async def heartbeat_at(now: float) -> float:
        await database.transact(
            lambda c: tinker_tables.touch_session(c, SESSION.id, heartbeat_at=now)
        )
        row = await database.transact(lambda c: tinker_tables.session(c, SESSION.id))
        assert row is not None
        return row.heartbeat_at

    assert await heartbeat_at(7.0) == 7.0
    assert await heartbeat_at(6.0) == 7.0
    await database.transact(
        lambda c: tinker_tables.finish_session(c, SESSION.id, reason="success", detail="", now=8.0)
    )
    assert await heartbeat_at(9.0) == 7.0


async def test_a_run_exists_once_and_a_sampling_session_may_be_asked_for_again(
    database: Database,
) -> None:
    with pytest.raises(AlreadyExists, match=RUN.id):
        await database.transact(lambda c: tinker_tables.insert_run(c, RUN))
    await database.transact(lambda c: tinker_tables.insert_sampling_session(c, SAMPLING))
    rows = await database.transact(
        lambda c: tinker_tables.sampling_sessions_of_session(c, SESSION.id)
    )
    assert rows == [SAMPLING]


async def test_a_home_of_the_first_version_gets_the_new_tables(tmp_path: Path) -> None:
    path = tmp_path / "control.sqlite3"
    with sqlite3.connect(path) as connection:
        connection.executescript(f"{MIGRATIONS[0]}PRAGMA user_version = 1;")
    connection.close()
    older = Database(path)
    await older.open()
    assert await older.transact(lambda c: tinker_tables.sessions(c, "local")) == []
    await older.close()
