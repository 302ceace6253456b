"""A whole front on a simulated disk, the moments at which its power may go, and what must hold after each.

The checks know the journal's format and nothing of how the front recovers from it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import shutil
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from faults.simulated_disk import SimulatedDisk
from homefire.foundation.clock import ManualClock
from homefire.foundation.durable import publish_directory, read_file, write_all
from homefire.trainer.front.api import build_app
from homefire.trainer.front.futures import Futures
from homefire.trainer.front.journal import Journal, read_journal
from homefire.trainer.front.records import (
    Accepted,
    Completed,
    PackCompleted,
    Record,
    Result,
    SaveTaken,
)
from homefire.trainer.front.recovery import journal_directory, recovery_directory
from homefire.trainer.front.service import Front
from homefire.trainer.front.sessions import Ledger
from homefire.wire.engine import (
    Arrays,
    LoadRecovery,
    Reply,
    Request,
    SaveRecovery,
    SaveReply,
    SaveRequest,
)
from homefire.wire.errors import HomefireError
from homefire.wire.internal import SECRET_HEADER
from homefire.wire.specs import TrainerSpec
from unit.trainer.front.conftest import SECRET, Client, EngineInProcess, Orders


@dataclass(frozen=True)
class Acknowledged:
    request_id: str
    model: str
    seq: int | None


@dataclass(frozen=True)
class Moment:
    """A disk as it was, and what clients had been told by then."""

    call: str
    disk: SimulatedDisk
    acknowledged: tuple[Acknowledged, ...]
    reported: dict[str, Result]
    remembered: frozenset[str]
    """Requests whose results the front had not forgotten."""


@dataclass
class Watch:
    """What clients of one front were told, and the disk behind every call."""

    disk: SimulatedDisk
    front: Front | None = None
    acknowledged: list[Acknowledged] = field(default_factory=list)
    reported: dict[str, Result] = field(default_factory=dict)
    moments: list[Moment] = field(default_factory=list)

    def note(self, call: str) -> None:
        """Called by whichever thread writes; the copies are of one piece under the interpreter's lock."""
        futures = self.front.futures if self.front else None
        known = (*futures._pending.copy(), *futures._stored.copy()) if futures else ()
        self.moments.append(
            Moment(
                call,
                self.disk.photo(),
                tuple(self.acknowledged),
                self.reported.copy(),
                frozenset(known),
            )
        )


@dataclass
class WatchedClient(Client):
    watch: Watch

    async def post(self, call: str, /, **body: Any) -> httpx.Response:
        answer = await super().post(call, **body)
        if answer.status_code == 200 and call == "retrieve_future":
            result = self.front.futures.read(body["request_id"])
            assert result is not None
            self.watch.reported[body["request_id"]] = result
        elif answer.status_code == 200 and "request_id" in answer.json():
            told = Acknowledged(
                answer.json()["request_id"], body.get("model_id", ""), body.get("seq_id")
            )
            self.watch.acknowledged.append(told)
        return answer


class EngineOnDisk(EngineInProcess):
    """Its recovery points lie on the simulated disk, and are read from there."""

    def __init__(self, orders: Orders, clock: ManualClock, disk: SimulatedDisk) -> None:
        super().__init__(orders, clock)
        self._disk = disk

    async def call(self, request: Request, arrays: Arrays | None = None) -> tuple[Reply, Arrays]:
        if isinstance(request, LoadRecovery):
            _copy_out(self._disk, Path(request.directory))
        return await super().call(request, arrays)

    async def begin(self, request: SaveRequest) -> asyncio.Future[SaveReply]:
        ended = await super().begin(request)
        if isinstance(request, SaveRecovery):
            _copy_in(self._disk, Path(request.directory))
        return ended


@contextlib.asynccontextmanager
async def front_on(
    disk: SimulatedDisk, spec: TrainerSpec, clock: ManualClock, watch: Watch | None = None
) -> AsyncIterator[WatchedClient]:
    watch, orders = watch or Watch(disk), Orders()

    async def start_engine() -> EngineOnDisk:
        return EngineOnDisk(orders, clock, disk)

    front = watch.front = Front(spec, clock, start_engine, disk)
    transport = httpx.ASGITransport(app=build_app(front))
    headers = {SECRET_HEADER: SECRET}
    async with httpx.AsyncClient(
        transport=transport, base_url="http://front", headers=headers
    ) as http:
        await front.start()
        try:
            yield WatchedClient(front, http, orders, watch)
        finally:
            await front.close()


def complaints(image: SimulatedDisk, moment: Moment, spec: TrainerSpec) -> Iterator[str]:
    """What a front that starts on this disk would have lost, or done twice, or be unable to do."""
    ledger = Ledger(Futures(ManualClock()))
    try:
        records = _start(image, spec, ledger)
    except (HomefireError, OSError, ValueError) as error:
        yield f"the journal cannot be read: {error}"
        return
    yield from _lost(ledger, moment)
    completed = [each for record in records for each in _completions(record)]
    positions = [each.position for each in completed]
    if positions != list(range(positions[0], positions[0] + len(positions)) if positions else ()):
        yield f"completions are not in order: {positions}"
    if len({each.request_id for each in completed}) < len(completed):
        yield "a request was completed twice"
    yield from _unrecoverable(image, spec, ledger, records, completed)


def _start(image: SimulatedDisk, spec: TrainerSpec, ledger: Ledger) -> list[Record]:
    journal = Journal(journal_directory(spec), ledger.apply, image)
    journal.open()
    records = []
    for segment, record in read_journal(journal.directory, image):
        ledger.apply(record, segment)
        records.append(record)
    return records


def _completions(record: Record) -> Sequence[Completed | SaveTaken]:
    if isinstance(record, PackCompleted):
        return record.completed
    return [record] if isinstance(record, Completed | SaveTaken) else []


def _lost(ledger: Ledger, moment: Moment) -> Iterator[str]:
    for told in moment.acknowledged:
        if told.request_id not in moment.remembered:
            continue
        if not ledger._futures.is_known(told.request_id):
            yield f"{told} is not known"
        elif told.seq is not None:
            seen = ledger.handles[told.model].recent.get(told.seq)
            if seen is None or seen.request_id != told.request_id:
                yield f"{told} sent again would run again"
    for request_id, result in moment.reported.items():
        if request_id in moment.remembered and ledger._futures.read(request_id) != result:
            yield f"the result of {request_id} was reported, and is another or none"


def _unrecoverable(
    image: SimulatedDisk,
    spec: TrainerSpec,
    ledger: Ledger,
    records: list[Record],
    completed: Sequence[Completed | SaveTaken],
) -> Iterator[str]:
    whole = [
        p.position for p in ledger.points if _is_whole(image, recovery_directory(spec) / p.name)
    ]
    start = max(whole, default=0)
    replayed = [each for each in completed if each.position > start]
    if len(replayed) != ledger.position - start:
        yield f"of operations {start + 1} to {ledger.position} the journal has {len(replayed)}"
    payloads = {record.request_id for record in records if isinstance(record, Accepted)}
    missing = [each.request_id for each in replayed if each.request_id not in payloads]
    if missing:
        yield f"no payload is left to replay {missing}"


def _is_whole(image: SimulatedDisk, point: Path) -> bool:
    try:
        record = json.loads(read_file(point / "recovery.json", disk=image))
        return all(
            hashlib.sha256(read_file(point / name, disk=image)).hexdigest() == entry["sha256"]
            for name, entry in record["files"].items()
        )
    except (OSError, ValueError):
        return False


def _copy_in(disk: SimulatedDisk, directory: Path) -> None:
    """As the engine writes a recovery point: aside, synced, then named."""
    aside = directory.with_name(f".{directory.name}.tmp")
    disk.mkdir(aside)
    for path in sorted(directory.iterdir()):
        file = disk.open(aside / path.name, 0o102)  # O_RDWR | O_CREAT
        write_all(file, path.read_bytes(), 0, disk=disk)
        disk.close(file)
    publish_directory(aside, directory, disk=disk)


def _copy_out(disk: SimulatedDisk, directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    for name in disk.listdir(directory):
        (directory / name).write_bytes(read_file(directory / name, disk=disk))
