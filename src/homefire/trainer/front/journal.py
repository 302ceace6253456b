"""The append-only journal of a trainer: nothing is acknowledged before it is here and on disk.

    job_dir/journal/00000001.log, 00000002.log, …

A segment is an 8-byte header, then frames. A frame is one group commit: everything that was appended
while the previous fsync ran.

    <4s magic> <u32 payload bytes> <u32 CRC-32 of payload> <payload: msgpack array of records>

A frame is written only after the one before it was synced. So a bad frame with nothing valid behind
it is the torn end of a crash, and is cut off; one with a valid frame behind it is damage, an error.
"""

from __future__ import annotations

import asyncio
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import msgspec

from homefire.foundation.disk import SYSTEM, Disk
from homefire.foundation.disk_space import spare_bytes
from homefire.foundation.durable import (
    make_directory,
    read_file,
    size_of,
    sync_directory,
    write_all,
)
from homefire.foundation.failpoints import failpoint
from homefire.trainer.front.records import Accepted, Record, SessionCreated, Snapshot
from homefire.wire.errors import DigestMismatch, StorageFailed

HEADER = b"HFJRNL01"
_MAGIC = b"HFRM"
_FRAME = struct.Struct("<4sII")
_MAX_FRAME_BYTES = (1 << 32) - 1
_ASIDE = "next.tmp"
"""A segment that is being made."""
_MAX_BATCH_BYTES = 64 << 20
"""A group commit is closed at this size, so that one frame never grows without bound."""


@dataclass(frozen=True)
class _Entry:
    record: Record
    encoded: bytes
    durable: asyncio.Future[None]

    @property
    def is_new_work(self) -> bool:
        """It leaves the reserve of the disk to what was taken on before."""
        return isinstance(self.record, Accepted | SessionCreated)


class Journal:
    """Owned by one event loop; writes happen in a thread of its own, in the order of `append`.

    `apply` is called on the loop with each record that has become durable, in order, before its
    `append` returns: what it builds is at every moment exactly what is on disk.
    """

    def __init__(
        self, directory: Path, apply: Callable[[Record, int], None], disk: Disk = SYSTEM
    ) -> None:
        """`directory` is made in its parent, which exists."""
        make_directory(directory, disk=disk)
        self._directory = directory
        self._disk = disk
        self._apply = apply
        self.num_bytes_written = 0
        """Since the front started."""
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._waiting: list[_Entry] = []
        self._rotations: list[tuple[Callable[[], Snapshot], asyncio.Future[None]]] = []
        self._flushing: asyncio.Task[None] | None = None
        self._segment = max(segments(directory, disk), default=0)
        self._file = -1
        self._is_named = True
        """The name of the segment that is being written is on disk."""
        self._durable_bytes = 0

    @property
    def directory(self) -> Path:
        return self._directory

    @property
    def segment(self) -> int:
        """Number of the segment that is being written."""
        return self._segment

    def open(self) -> None:
        """Cuts a torn end off the last segment and continues it; starts the first one if none is.

        Blocks. Raises DigestMismatch for damage that is not a torn end.
        """
        if self._segment == 0:
            self._start(1, b"")
            return
        path = segment_path(self._directory, self._segment)
        data = read_file(path, disk=self._disk)
        good = sum(len(frame) for frame in _frames(data, path)) + len(HEADER)
        self._file = self._disk.open(path, os.O_RDWR)
        self._disk.ftruncate(self._file, 0 if good > len(data) else good)
        self._disk.pwrite(self._file, HEADER, 0)
        self._disk.fsync(self._file)
        self._durable_bytes = good

    async def append(self, record: Record) -> None:
        """Returns once the record is on disk. Raises StorageFailed, and then it is not."""
        encoded = msgspec.msgpack.encode(record)
        durable: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Entry(record, encoded, durable))
        self._wake()
        await durable

    async def rotate(self, make_snapshot: Callable[[], Snapshot]) -> None:
        """Starts a new segment with the snapshot of all that is durable at that moment."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._rotations.append((make_snapshot, done))
        self._wake()
        await done

    def size_bytes(self) -> int:
        """Of all segments. Blocks."""
        numbers = segments(self._directory, self._disk)
        paths = [segment_path(self._directory, number) for number in numbers]
        return sum(size_of(path, disk=self._disk) for path in paths)

    def trim(self, below: int) -> list[int]:
        """Deletes the segments below a number; says which.

        Oldest first, each for good before the next: a segment is never missing between two others.
        """
        gone = [number for number in segments(self._directory, self._disk) if number < below]
        for number in gone:
            self._disk.unlink(segment_path(self._directory, number))
            sync_directory(self._directory, disk=self._disk)
        return gone

    async def close(self) -> None:
        while self._flushing is not None:
            await self._flushing
        self._writer.shutdown()
        self._disk.close(self._file)

    def _wake(self) -> None:
        if self._flushing is None:
            self._flushing = asyncio.create_task(self._flush())

    async def _flush(self) -> None:
        try:
            while self._waiting or self._rotations:
                if self._rotations:
                    await self._rotate(*self._rotations.pop(0))
                else:
                    await self._commit(self._take_batch())
        finally:
            self._flushing = None

    async def _commit(self, batch: list[_Entry]) -> None:
        try:
            loop = asyncio.get_running_loop()
            written = await loop.run_in_executor(self._writer, self._write, batch)
        except OSError as exc:
            for entry in batch:
                _fail(entry.durable, _unwritable(exc))
            return
        for entry in written:
            self._apply(entry.record, self._segment)
            _succeed(entry.durable)
        for entry in batch:
            _fail(entry.durable, _disk_full())  # only what was not written is still waiting

    async def _rotate(
        self, make_snapshot: Callable[[], Snapshot], done: asyncio.Future[None]
    ) -> None:
        first = _frame([msgspec.msgpack.encode(make_snapshot())])
        try:
            loop, number = asyncio.get_running_loop(), self._segment + 1
            await loop.run_in_executor(self._writer, self._start, number, first)
        except OSError as exc:
            _fail(done, _unwritable(exc))
        else:
            _succeed(done)

    def _take_batch(self) -> list[_Entry]:
        size = count = 0
        for entry in self._waiting:
            if count and size + len(entry.encoded) > _MAX_BATCH_BYTES:
                break
            size += len(entry.encoded)
            count += 1
        batch, self._waiting = self._waiting[:count], self._waiting[count:]
        return batch

    def _write(self, batch: list[_Entry]) -> list[_Entry]:
        """What of the batch is on disk now: all of it, or all but new work for which the disk has no room.

        A failed write is taken back, so that later frames do not follow half a one.
        """
        batch = self._affordable(batch)
        if not batch:
            return []
        frame = _frame([entry.encoded for entry in batch])
        self._sync_name()
        failpoint("journal.before_write")
        try:
            write_all(self._file, frame, self._durable_bytes, disk=self._disk)
            failpoint("journal.before_fsync")
            self._disk.fsync(self._file)
        except OSError:
            self._disk.ftruncate(self._file, self._durable_bytes)
            raise
        self._durable_bytes += len(frame)
        self.num_bytes_written += len(frame)
        failpoint("journal.after_fsync_before_ack")
        return batch

    def _affordable(self, batch: list[_Entry]) -> list[_Entry]:
        size_bytes = sum(len(entry.encoded) for entry in batch if entry.is_new_work)
        if not size_bytes or size_bytes <= spare_bytes(self._directory, self._disk):
            return batch
        return [entry for entry in batch if not entry.is_new_work]

    def _start(self, number: int, first: bytes) -> None:
        """A segment gets its name when it is whole: a power cut leaves none without its snapshot."""
        aside = self._directory / _ASIDE
        file = self._disk.open(aside, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            write_all(file, HEADER + first, 0, disk=self._disk)
            self._disk.fsync(file)
            failpoint("journal.before_name")
            self._disk.replace(aside, segment_path(self._directory, number))
        except OSError:
            self._disk.close(file)
            raise
        if self._file >= 0:
            self._disk.close(self._file)
        self._file, self._segment = file, number
        self._durable_bytes = len(HEADER) + len(first)
        self._is_named = False
        failpoint("journal.after_name")
        self._sync_name()

    def _sync_name(self) -> None:
        """Nothing in a segment counts before its name is safe, however often that fails."""
        if not self._is_named:
            sync_directory(self._directory, disk=self._disk)
            self._is_named = True


def read_journal(directory: Path, disk: Disk = SYSTEM) -> Iterator[tuple[int, Record]]:
    """All records in order, each with the number of its segment; blocks.

    Only the last segment may have a torn end. Raises DigestMismatch for damage.
    """
    numbers = segments(directory, disk)
    for number in numbers:
        path = segment_path(directory, number)
        data, size = read_file(path, disk=disk), len(HEADER)
        for frame in _frames(data, path):
            size += len(frame)
            for record in msgspec.msgpack.decode(frame[_FRAME.size :], type=list[Record]):
                yield number, record
        if number != numbers[-1] and size != len(data):
            raise DigestMismatch(f"{path} is damaged at byte {size}", hint=_DAMAGE_HINT)


def segments(directory: Path, disk: Disk = SYSTEM) -> list[int]:
    """Their numbers, in order."""
    names = disk.listdir(directory)
    return sorted(int(name.removesuffix(".log")) for name in names if name.endswith(".log"))


def segment_path(directory: Path, number: int) -> Path:
    return directory / f"{number:08d}.log"


_DAMAGE_HINT = "restore the job's directory from a copy, or branch from its last checkpoint"


def _unwritable(exc: OSError) -> StorageFailed:
    return StorageFailed(f"the journal cannot be written: {exc}", hint="free disk space")


def _disk_full() -> StorageFailed:
    return StorageFailed(
        "the disk of the journal is full: what was accepted goes on, nothing new is taken on",
        hint="free disk space, e.g. with `homefire checkpoint prune`; then send it again",
    )


def _succeed(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _fail(future: asyncio.Future[None], error: StorageFailed) -> None:
    if not future.done():
        future.set_exception(error)


def _frame(records: list[bytes]) -> bytes:
    payload = msgspec.msgpack.encode([msgspec.Raw(record) for record in records])
    if len(payload) > _MAX_FRAME_BYTES:
        raise StorageFailed(f"a record of {len(payload)} bytes does not fit into the journal")
    return _FRAME.pack(_MAGIC, len(payload), zlib.crc32(payload)) + payload


def _frames(data: bytes, path: Path) -> Iterator[bytes]:
    """The valid frames of a segment; stops at a torn end, raises DigestMismatch at damage."""
    if data[: len(HEADER)] != HEADER[: len(data)]:
        raise DigestMismatch(f"{path} is not a journal segment", hint=_DAMAGE_HINT)
    offset = len(HEADER)
    while frame := _frame_at(data, offset):
        yield frame
        offset += len(frame)
    later = data.find(_MAGIC, offset + 1)
    while later >= 0:
        if _frame_at(data, later):
            raise DigestMismatch(f"{path} is damaged at byte {offset}", hint=_DAMAGE_HINT)
        later = data.find(_MAGIC, later + 1)


def _frame_at(data: bytes, offset: int) -> bytes:
    """The frame that begins at `offset`, or nothing."""
    if offset + _FRAME.size > len(data):
        return b""
    magic, size, crc = _FRAME.unpack_from(data, offset)
    end = offset + _FRAME.size + size
    if magic != _MAGIC or end > len(data):
        return b""
    return data[offset:end] if zlib.crc32(data[offset + _FRAME.size : end]) == crc else b""
