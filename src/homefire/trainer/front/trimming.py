"""What of the journal may go: segments behind a verified recovery point, without results to fetch.

Results that nobody fetched keep their segment for as long as the journal is small; above the cap they
are written again at its end, and the segment goes.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from homefire.checkpoints import FileEntry
from homefire.foundation.disk import SYSTEM, Disk
from homefire.foundation.durable import chunks_of, read_file
from homefire.trainer.front.futures import Futures
from homefire.trainer.front.journal import Journal
from homefire.trainer.front.records import KeptResult, PointTaken, ResultsKept
from homefire.trainer.front.sessions import NUM_POINTS_KEPT, Ledger
from homefire.wire.errors import DigestMismatch, ErrorRecord
from homefire.wire.specs import TrainerSpec

log = logging.getLogger(__name__)
RECORD_FILE = "recovery.json"
_RECORD_BYTES = 16 << 20
"""Of results written again together."""


class Trimming:
    """`report` is told of a point that is damaged."""

    def __init__(
        self,
        spec: TrainerSpec,
        ledger: Ledger,
        futures: Futures,
        journal: Journal,
        points: Path,
        report: Callable[[ErrorRecord], None],
        disk: Disk = SYSTEM,
    ) -> None:
        self._spec = spec
        self._ledger = ledger
        self._futures = futures
        self._journal = journal
        self._points = points
        self._report = report
        self._disk = disk
        self._verified: set[str] = set()

    async def trim(self) -> None:
        """After a recovery point, beside operations. Raises StorageFailed; then less is deleted."""
        if self._spec.keep_journal:
            return
        floor = await self._verified_floor()
        needed = self._futures.oldest_segment()
        await asyncio.to_thread(self._journal.trim, floor if needed is None else min(floor, needed))
        if await asyncio.to_thread(self._journal.size_bytes) > self._spec.journal_cap_bytes:
            await self._write_again(below=floor)
            await asyncio.to_thread(self._journal.trim, floor)

    async def _verified_floor(self) -> int:
        """Nothing goes while the older of two points is not known to be whole."""
        points = self._ledger.points
        self._verified &= {point.name for point in points}
        for point in points:
            if point.name not in self._verified:
                await self._verify(point)
        is_safe = len(points) == NUM_POINTS_KEPT and points[0].name in self._verified
        return points[0].floor if is_safe else 0

    async def _verify(self, point: PointTaken) -> None:
        try:
            await asyncio.to_thread(verify_point, self._points / point.name, self._disk)
        except DigestMismatch as error:
            log.error("recovery point %s: %s", point.name, error)
            self._report(ErrorRecord.of(error))
        else:
            self._verified.add(point.name)

    async def _write_again(self, *, below: int) -> None:
        for results in _in_records(self._futures.results_below(below)):
            await self._journal.append(ResultsKept(results))


class _Record(msgspec.Struct):
    """What this needs of `recovery.json`."""

    files: dict[str, FileEntry]


def verify_point(directory: Path, disk: Disk = SYSTEM) -> None:
    """Reads every file of a recovery point again; DigestMismatch names the one that is damaged. Blocks."""
    try:
        record = msgspec.json.decode(read_file(directory / RECORD_FILE, disk=disk), type=_Record)
        wrong = [n for n, entry in record.files.items() if _entry(directory / n, disk) != entry]
    except (OSError, msgspec.DecodeError) as exc:
        raise DigestMismatch(f"recovery point {directory} cannot be read back: {exc}") from exc
    if wrong:
        raise DigestMismatch(f"{directory / wrong[0]} is not what was written")


def _entry(path: Path, disk: Disk) -> FileEntry:
    sha256, size_bytes = hashlib.sha256(), 0
    for chunk in chunks_of(path, disk=disk):
        sha256.update(chunk)
        size_bytes += len(chunk)
    return FileEntry(size_bytes, sha256.hexdigest())


def _in_records(results: list[KeptResult]) -> Iterator[list[KeptResult]]:
    record: list[KeptResult] = []
    for result in results:
        record.append(result)
        if sum(len(kept.result) for kept in record) >= _RECORD_BYTES:
            yield record
            record = []
    if record:
        yield record
