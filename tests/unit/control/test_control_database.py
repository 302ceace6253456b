from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from homefire.control.db import statements, tables
from homefire.control.db.database import Database
from homefire.control.db.migrations import MIGRATIONS
from homefire.control.db.rows import OperationRow
from homefire.wire.errors import HomeBusy, HomeTooNew, StorageFailed


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    opened = Database(tmp_path / "control.sqlite3")
    await opened.open()
    yield opened
    await opened.close()


async def test_a_database_of_a_newer_version_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "control.sqlite3"
    with sqlite3.connect(path) as connection:
        connection.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    connection.close()
    newer = Database(path)
    with pytest.raises(HomeTooNew, match="upgrade homefire"):
        await newer.open()
    await newer.close()


async def test_a_second_control_plane_on_the_same_file_is_refused(
    tmp_path: Path, database: Database
) -> None:
    second = Database(tmp_path / "control.sqlite3")
    with pytest.raises(HomeBusy, match="another control plane"):
        await second.open()
    await second.close()


async def test_a_transaction_that_raises_leaves_nothing(database: Database) -> None:
    def work(connection: sqlite3.Connection) -> None:
        tables.register_key(connection, "abc", "local", 1.0)
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        await database.transact(work)
    assert await database.transact(tables.keys) == []


async def test_what_was_written_is_there_after_opening_again(tmp_path: Path) -> None:
    path = tmp_path / "control.sqlite3"
    first = Database(path)
    await first.open()
    await first.transact(lambda c: tables.register_key(c, "abc", "local", 1.0))
    await first.close()
    second = Database(path)
    await second.open()
    (key,) = await second.transact(tables.keys)
    await second.close()
    assert (key.sha256, key.account) == ("abc", "local")
    assert path.stat().st_mode & 0o077 == 0


async def test_an_accounts_older_key_is_revoked_by_its_new_one(database: Database) -> None:
    await database.transact(lambda c: tables.register_key(c, "old", "local", 1.0))
    await database.transact(lambda c: tables.register_key(c, "new", "local", 2.0))
    await database.transact(lambda c: tables.register_key(c, "new", "local", 3.0))
    assert [key.sha256 for key in await database.transact(tables.keys)] == ["new"]


async def test_a_refusal_of_the_disk_is_a_storage_failure(database: Database) -> None:
    await database.transact(lambda c: c.execute("PRAGMA max_page_count = 1") and None)

    def work(connection: sqlite3.Connection) -> None:
        for number in range(2000):
            operation = OperationRow(
                name=f"operation-{number}" + "x" * 500,
                account="local",
                done=False,
                error_code="",
                error="",
                model="m",
                created_at=0.0,
            )
            tables.insert_operation(connection, operation)

    with pytest.raises(StorageFailed, match="full"):
        await database.transact(work)
    assert await database.transact(tables.keys) == []


def test_no_statement_is_built_from_values() -> None:
    texts = [value for name, value in vars(statements).items() if name.isupper()]
    assert len(texts) > 20
    for text in texts:
        assert "%" not in text
        assert "{" not in text
