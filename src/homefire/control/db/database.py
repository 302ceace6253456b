"""One connection, used by one thread only, which also is the lock between transactions.

The file is held exclusively: a second control plane on the same home is refused when it opens it.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from homefire.control.db.migrations import migrate
from homefire.wire.errors import HomeBusy, StorageFailed

Result = TypeVar("Result")


class Database:
    """Runs functions of a connection, one at a time, each in a transaction of its own."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="database")
        self._connection: sqlite3.Connection | None = None

    async def open(self) -> None:
        """Raises HomeBusy, HomeTooNew or StorageFailed."""
        await self._in_thread(self._open)

    async def close(self) -> None:
        await self._in_thread(self._close)
        self._thread.shutdown()

    async def transact(self, work: Callable[[sqlite3.Connection], Result]) -> Result:
        """All that `work` wrote is on disk when this returns, or nothing is when it raises.

        `work` runs off the event loop and must not wait for anything but the disk.
        """
        return await self._in_thread(lambda: self._transact(work))

    async def _in_thread(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _open(self) -> None:
        self._path.touch(mode=0o600)
        connection = sqlite3.connect(self._path, isolation_level=None, timeout=0.2)
        try:
            connection.row_factory = sqlite3.Row
            connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.execute("PRAGMA foreign_keys = ON")
            migrate(connection, self._path)
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("COMMIT")
        except sqlite3.OperationalError as exc:
            connection.close()
            raise self._translate(exc) from exc
        except BaseException:
            connection.close()
            raise
        self._connection = connection

    def _transact(self, work: Callable[[sqlite3.Connection], Result]) -> Result:
        connection = self._connection
        if connection is None:
            raise StorageFailed(f"{self._path} is closed")
        try:
            connection.execute("BEGIN IMMEDIATE")
            result = work(connection)
            connection.execute("COMMIT")
        except sqlite3.OperationalError as exc:
            raise self._translate(exc) from exc
        finally:
            # SQLite itself rolls back after some failures, a full disk for one.
            if connection.in_transaction:
                connection.execute("ROLLBACK")
        return result

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _translate(self, error: sqlite3.OperationalError) -> HomeBusy | StorageFailed:
        if error.sqlite_errorcode in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}:
            return HomeBusy(
                f"{self._path} is held by another control plane",
                hint="stop the other `homefire up`, or choose another home with --home",
            )
        return StorageFailed(f"{self._path}: {error}", hint="look at the disk that holds the home")
