from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from homefire.trainer.front import journal as journals
from homefire.trainer.front.journal import Journal, read_journal, segment_path, segments
from homefire.trainer.front.records import Completed, Record, SessionCreated, Snapshot
from homefire.wire.errors import DigestMismatch, StorageFailed

SNAPSHOT = Snapshot(position=0, steps={}, sessions=[], handles=[], num_accepted=0, points=[])


def session(name: str, size: int = 0) -> SessionCreated:
    return SessionCreated(name + "x" * size, 1.0)


def write(directory: Path, *batches: list[Record]) -> list[tuple[Record, int]]:
    """Each batch is one group commit. Returns what was applied."""
    applied: list[tuple[Record, int]] = []

    async def run() -> None:
        journal = Journal(directory, lambda record, segment: applied.append((record, segment)))
        journal.open()
        for batch in batches:
            await asyncio.gather(*(journal.append(record) for record in batch))
        await journal.close()

    asyncio.run(run())
    return applied


def contents(directory: Path) -> list[Record]:
    return [record for _, record in read_journal(directory)]


def test_what_was_appended_is_read_in_order_with_its_segment(tmp_path: Path) -> None:
    records = [session(f"s{n}") for n in range(5)]
    applied = write(tmp_path, records[:3], records[3:])
    assert contents(tmp_path) == records
    assert applied == [(record, 1) for record in records]


def test_an_opened_journal_is_continued(tmp_path: Path) -> None:
    write(tmp_path, [session("a")])
    write(tmp_path, [session("b")])
    assert contents(tmp_path) == [session("a"), session("b")]


def test_rotation_starts_a_segment_with_the_snapshot_and_trimming_deletes_before_it(
    tmp_path: Path,
) -> None:
    async def run() -> None:
        journal = Journal(tmp_path, lambda record, segment: None)
        journal.open()
        await journal.append(session("a"))
        await journal.rotate(lambda: SNAPSHOT)
        await journal.append(session("b"))
        await journal.close()
        assert journal.trim(journal.segment) == [1]

    asyncio.run(run())
    assert list(read_journal(tmp_path)) == [(2, SNAPSHOT), (2, session("b"))]


def test_a_snapshot_is_made_of_exactly_what_is_durable_when_others_append_meanwhile(
    tmp_path: Path,
) -> None:
    applied: list[Record] = []
    durable_at_snapshot: list[int] = []

    def snapshot() -> Snapshot:
        durable_at_snapshot.append(len(applied))
        return SNAPSHOT

    async def run() -> None:
        journal = Journal(tmp_path, lambda record, segment: applied.append(record))
        journal.open()
        appends = [journal.append(session(str(n))) for n in range(20)]
        await asyncio.gather(*appends[:10], journal.rotate(snapshot), *appends[10:])
        await journal.close()

    asyncio.run(run())
    before = sum(1 for segment, _ in read_journal(tmp_path) if segment == 1)
    assert durable_at_snapshot == [before]


def torn(data: bytes, cut: int) -> bytes:
    return data[: len(data) - cut]


@pytest.fixture(scope="module")
def three_commits(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A segment of three group commits; `last_frame_bytes` says how long the last one is."""
    directory = tmp_path_factory.mktemp("journal")
    write(directory, [session("a", 30)], [session("b", 30), session("c")], [session("d", 30)])
    return segment_path(directory, 1).read_bytes()


def last_frame_bytes(data: bytes) -> int:
    return len(data) - data.rindex(b"HFRM")


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_torn_end_loses_the_last_commit_at_most_and_writing_goes_on(
    tmp_path_factory: pytest.TempPathFactory, three_commits: bytes, data: st.DataObject
) -> None:
    cut = data.draw(st.integers(1, last_frame_bytes(three_commits)))
    directory = tmp_path_factory.mktemp("journal")
    segment_path(directory, 1).write_bytes(torn(three_commits, cut))
    write(directory, [session("e")])
    kept = [session("a", 30), session("b", 30), session("c")]
    assert contents(directory) == [*kept, session("e")]


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_flipped_bit_before_the_last_commit_is_damage_never_a_shorter_journal(
    tmp_path: Path, three_commits: bytes, data: st.DataObject
) -> None:
    damaged = bytearray(three_commits)
    at = data.draw(st.integers(0, len(damaged) - last_frame_bytes(three_commits) - 1))
    damaged[at] ^= 1 << data.draw(st.integers(0, 7))
    segment_path(tmp_path, 1).write_bytes(damaged)
    with pytest.raises(DigestMismatch):
        contents(tmp_path)


def test_only_the_last_segment_may_have_a_torn_end(tmp_path: Path) -> None:
    async def run() -> None:
        journal = Journal(tmp_path, lambda record, segment: None)
        journal.open()
        await journal.append(session("a"))
        await journal.rotate(lambda: SNAPSHOT)
        await journal.close()

    asyncio.run(run())
    path = segment_path(tmp_path, 1)
    path.write_bytes(torn(path.read_bytes(), 1))
    with pytest.raises(DigestMismatch, match=r"00000001\.log"):
        contents(tmp_path)


def test_a_segment_that_was_only_begun_when_the_power_went_is_begun_again(tmp_path: Path) -> None:
    tmp_path.joinpath("00000001.log").write_bytes(b"HFJ")
    write(tmp_path, [session("a")])
    assert contents(tmp_path) == [session("a")]


def test_a_failed_sync_fails_the_append_takes_it_back_and_heals(
    tmp_path: Path, failpoints: Callable[[str], None]
) -> None:
    applied: list[Record] = []

    async def run() -> None:
        journal = Journal(tmp_path, lambda record, segment: applied.append(record))
        journal.open()
        await journal.append(session("a"))
        failpoints("journal.before_fsync=enospc")
        with pytest.raises(StorageFailed, match="cannot be written"):
            await journal.append(session("lost"))
        await journal.append(session("b"))
        await journal.close()

    asyncio.run(run())
    assert contents(tmp_path) == applied == [session("a"), session("b")]


def test_a_result_is_read_as_it_was_written(tmp_path: Path) -> None:
    record = Completed(request_id="r", position=1, result=b"\0\xff", ok=True, step=3, at=2.0)
    write(tmp_path, [record])
    assert contents(tmp_path) == [record]
    assert segments(tmp_path) == [1]


@pytest.fixture
def failpoints(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    from homefire.foundation import failpoints as module

    def enable(text: str) -> None:
        monkeypatch.setattr(module, "_actions", module._parse(text))
        monkeypatch.setattr(module, "_reached", type(module._reached)())

    return enable


@pytest.mark.parametrize("failure", ["eio", "enospc"])
def test_a_group_commit_that_the_disk_refuses_fails_all_of_it_and_the_next_one_heals(
    tmp_path: Path, failpoints: Callable[[str], None], failure: str
) -> None:
    async def run() -> list[BaseException | None]:
        journal = Journal(tmp_path, lambda record, segment: None)
        journal.open()
        failpoints(f"journal.before_fsync={failure}")
        appends = [journal.append(session(name)) for name in "ab"]
        failures = await asyncio.gather(*appends, return_exceptions=True)
        await journal.append(session("c"))
        await journal.close()
        return failures

    assert [type(failure) for failure in asyncio.run(run())] == [StorageFailed, StorageFailed]
    assert contents(tmp_path) == [session("c")]


def test_new_work_leaves_the_reserve_of_the_disk_to_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last bytes belong to what was accepted; with room again, new work is taken on again."""
    result = Completed(request_id="r", position=1, result=b"x" * 100, ok=True, step=1, at=1.0)
    spare = [10_000]
    monkeypatch.setattr(journals, "spare_bytes", lambda directory, disk: spare[0])

    async def run() -> None:
        journal = Journal(tmp_path, lambda record, segment: None)
        journal.open()
        await journal.append(session("a"))
        spare[0] = -1
        new, old = journal.append(session("refused")), journal.append(result)
        refusal, done = await asyncio.gather(new, old, return_exceptions=True)
        assert isinstance(refusal, StorageFailed)
        assert "nothing new is taken on" in refusal.message
        assert done is None
        spare[0] = 10_000
        await journal.append(session("b"))
        await journal.close()

    asyncio.run(run())
    assert contents(tmp_path) == [session("a"), result, session("b")]
