"""Power cuts at every call that reaches the disk, with all that each may leave behind.

A front runs an eventful history on a simulated disk; tens of thousands of disks that a crash could
have left are then read, each as the next start would. Some are started for real, and trained to the end.
"""

from __future__ import annotations

import asyncio
import secrets
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from faults.power_cuts import Moment, Watch, WatchedClient, complaints, front_on
from faults.simulated_disk import ForgetfulDisk, NamelessDisk, SimulatedDisk
from homefire.foundation.clock import ManualClock
from homefire.trainer.front import journal
from homefire.trainer.front.futures import UNREAD_RETENTION_S
from homefire.trainer.front.journal import Journal
from homefire.trainer.front.records import Record
from homefire.trainer.front.sessions import Ledger
from homefire.wire.specs import TrainerSpec
from unit.trainer.front.conftest import make_datum, make_spec

__all__ = ["make_spec"]

CUTS_PER_CALL = 220
MIN_CUTS = 20_000
CUTS_FOR_A_PLANTED_BUG = 20
INTERVAL_S = 10.0
AGES_S = UNREAD_RETENTION_S + 1
History = Callable[[WatchedClient, ManualClock], Awaitable[None]]


async def out_of_order(client: WatchedClient, clock: ManualClock) -> None:
    """Chunks out of order, a duplicate, a gap that is given up, and a client that is fenced by another."""
    first = await client.model()
    await client.forward_backward(first, 2)
    sent = await client.forward_backward(first, 1)
    assert await client.forward_backward(first, 1) == sent
    await client.result(await client.optim_step(first, 3))
    held = await client.forward_backward(first, 5)
    clock.advance(client.front.spec.gap_timeout_s)
    await client.front.admission.gaps.expire_due()
    await client.result(held)
    await client.result(await client.optim_step(first, 6))
    abandoned = await client.forward_backward(first, 8)
    second = await client.model()
    await client.result(abandoned)
    await client.train(second, 1, 1)


async def points_and_trims(client: WatchedClient, clock: ManualClock) -> None:
    """Results are fetched and forgotten, points are taken, and segments behind the older one go."""
    model = await client.model()
    for round_, seconds in enumerate((INTERVAL_S, INTERVAL_S, INTERVAL_S, AGES_S)):
        await client.train(model, 1 + 2 * round_, 1)
        await pass_time(client, clock, seconds)
    await client.train(model, 9, 1)


async def pass_time(client: WatchedClient, clock: ManualClock, seconds: float) -> None:
    """A recovery point falls due and is taken; what is too old is forgotten."""
    known = len(client.events("recovery_point"))
    clock.advance(seconds)
    client.front.worker.wake()
    while len(client.events("recovery_point")) == known:
        await asyncio.sleep(0)


HISTORIES: tuple[History, ...] = (out_of_order, points_and_trims)


def moments_of(history: History, disk: SimulatedDisk, spec: TrainerSpec) -> list[Moment]:
    clock, watch = ManualClock(), Watch(disk)
    disk.make_durably(Path(spec.job_dir))
    disk.after_call = watch.note

    async def run() -> None:
        async with front_on(disk, spec, clock, watch) as client:
            await history(client, clock)

    asyncio.run(run())
    return watch.moments


@pytest.fixture
def spec(make_spec: Callable[..., TrainerSpec]) -> Callable[[], TrainerSpec]:
    def make() -> TrainerSpec:
        job = f"job-{secrets.token_hex(4)}"
        return make_spec(job=job, recovery_interval_s=INTERVAL_S, gap_timeout_s=5.0)

    return make


def first_complaint(
    moments: list[Moment], spec: TrainerSpec, counts: Counter[str], limit: int = CUTS_PER_CALL
) -> str | None:
    for number, moment in enumerate(moments):
        for image in moment.disk.crashes(limit=limit, seed=number):
            counts[moment.call] += 1
            for complaint in complaints(image, moment, spec):
                return f"cut {counts.total()}, after call {number}, {moment.call}: {complaint}"
    return None


def test_no_power_cut_loses_or_doubles_what_was_acknowledged(spec) -> None:
    counts: Counter[str] = Counter()
    for history in HISTORIES:
        job = spec()
        moments = moments_of(history, SimulatedDisk(), job)
        assert first_complaint(moments, job, counts) is None
    assert counts.total() >= MIN_CUTS, counts
    assert {"open", "pwrite", "fsync", "unlink", "rename", "mkdir", "rmdir"} <= counts.keys()


# The checks find what they are for ---------------------------------------------------------------


def the_fsync_is_dropped(monkeypatch: pytest.MonkeyPatch) -> SimulatedDisk:
    return ForgetfulDisk()


def directories_are_not_synced(monkeypatch: pytest.MonkeyPatch) -> SimulatedDisk:
    return NamelessDisk()


def requests_are_answered_before_they_are_journaled(
    monkeypatch: pytest.MonkeyPatch,
) -> SimulatedDisk:
    commit = Journal._commit

    async def planted(self: Journal, batch: list[journal._Entry]) -> None:
        apply = self._apply
        for entry in batch:
            apply(entry.record, self.segment)
            entry.durable.set_result(None)
        for _ in range(100):
            await asyncio.sleep(0)
        self._apply = lambda record, segment: None
        await commit(self, batch)
        self._apply = apply

    monkeypatch.setattr(Journal, "_commit", planted)
    return SimulatedDisk()


def the_journal_is_trimmed_too_early(monkeypatch: pytest.MonkeyPatch) -> SimulatedDisk:
    trim = Journal.trim
    monkeypatch.setattr(Journal, "trim", lambda self, below: trim(self, self.segment))
    return SimulatedDisk()


def segments_are_trimmed_newest_first(monkeypatch: pytest.MonkeyPatch) -> SimulatedDisk:
    """And none is made sure of before the next: one may be missing between two others."""

    def planted(self: Journal, below: int) -> list[int]:
        gone = [n for n in journal.segments(self.directory, self._disk) if n < below]
        for number in reversed(gone):
            self._disk.unlink(journal.segment_path(self.directory, number))
        return gone

    monkeypatch.setattr(Journal, "trim", planted)
    return SimulatedDisk()


def frames_are_believed_without_their_digest(monkeypatch: pytest.MonkeyPatch) -> SimulatedDisk:
    class Believed(int):
        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = int.__hash__

    crc32 = zlib.crc32
    monkeypatch.setattr(journal.zlib, "crc32", lambda data: Believed(crc32(data)))
    return SimulatedDisk()


def completions_are_applied_twice(monkeypatch: pytest.MonkeyPatch) -> SimulatedDisk:
    apply = Ledger.apply

    def planted(self: Ledger, record: Record, segment: int) -> None:
        position = self.position
        apply(self, record, segment)
        self.position += self.position - position

    monkeypatch.setattr(Ledger, "apply", planted)
    return SimulatedDisk()


PLANTED = (
    the_fsync_is_dropped,
    directories_are_not_synced,
    requests_are_answered_before_they_are_journaled,
    the_journal_is_trimmed_too_early,
    segments_are_trimmed_newest_first,
    frames_are_believed_without_their_digest,
    completions_are_applied_twice,
)


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_a_planted_bug_is_found(plant, spec, monkeypatch) -> None:
    found = []
    for history in HISTORIES:
        job = spec()
        with monkeypatch.context() as patched:
            disk = plant(patched)
            moments = moments_of(history, disk, job)
            found.append(first_complaint(moments, job, Counter(), CUTS_FOR_A_PLANTED_BUG))
    assert any(found)


# And the front itself goes on from there ---------------------------------------------------------

STEPS = 4


async def train_through(client: WatchedClient, session: str, clock: ManualClock) -> str:
    """Sends everything, whether or not an earlier life has had it; the digest at the end."""
    model = (await client.create(session))["model_id"]
    for step in range(STEPS):
        seq = 3 * step + 1
        data = [make_datum([1 + step, 2, 3])]
        await client.forward_backward(model, seq + 1, data=data)
        await client.forward_backward(model, seq, data=data)
        stepped = await client.result(await client.optim_step(model, seq + 2))
        assert stepped["step"] == step + 1, stepped
        if client.watch.moments and step % 2:
            await pass_time(client, clock, INTERVAL_S)
    while client.front.worker.model is None:
        await asyncio.sleep(0)
    return await client.digest()


def test_a_front_that_starts_after_a_power_cut_ends_with_the_same_weights(spec) -> None:
    job, clock, disk = spec(), ManualClock(), SimulatedDisk()
    disk.make_durably(Path(job.job_dir))
    watch = Watch(disk)

    async def undisturbed() -> tuple[str, str]:
        async with front_on(disk, job, clock, watch) as client:
            session = await client.session()
            disk.after_call = watch.note
            return session, await train_through(client, session, clock)

    session, digest = asyncio.run(undisturbed())
    recovered: Counter[bool] = Counter()
    for number, moment in enumerate(watch.moments):
        for image in moment.disk.crashes(limit=2, seed=number):
            ended, had_point = asyncio.run(_after(image, job, session))
            assert ended == digest, f"after call {number}, {moment.call}"
            recovered[had_point] += 1
    assert recovered.total() > 100
    assert recovered[True] > 20


async def _after(image: SimulatedDisk, spec: TrainerSpec, session: str) -> tuple[str, bool]:
    clock = ManualClock()
    async with front_on(image, spec, clock) as client:
        had_point = bool(client.front.ledger.points)
        digest = await train_through(client, session, clock)
        assert (await client.status()).error is None
        return digest, had_point
