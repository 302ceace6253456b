"""What goes of the journal, and what stays whatever else goes."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from homefire.checkpoints import file_entry
from homefire.foundation.clock import ManualClock
from homefire.foundation.disk import Disk
from homefire.trainer.front import trimming
from homefire.trainer.front.journal import segments
from homefire.trainer.front.trimming import RECORD_FILE, verify_point
from homefire.wire.errors import DigestMismatch

LATER_S = 24 * 3600
"""All results are forgotten by then."""


def kept_segments(front) -> list[int]:
    return segments(front.journal.directory)


async def train_with_points(client, clock: ManualClock, points: int) -> str:
    model = await client.model()
    for number in range(points):
        await client.train(model, 1 + 2 * number, 1)
        clock.advance(LATER_S)
    await client.train(model, 1 + 2 * points, 1)
    return model


async def test_segments_go_once_a_verified_point_covers_them(start_front) -> None:
    clock = ManualClock()
    async with start_front(clock=clock) as client:
        await train_with_points(client, clock, 4)
    async with start_front(clock=clock) as client:
        assert min(kept_segments(client.front)) > 1


async def test_nothing_goes_behind_a_point_that_cannot_be_read_back(
    start_front, monkeypatch
) -> None:
    """The planted bug of a disk that lies: every point reads back otherwise than it was written."""

    def lie(directory: Path, disk: Disk) -> None:
        raise DigestMismatch(f"{directory / 'policy.masters.safetensors'} is not what was written")

    monkeypatch.setattr(trimming, "verify_point", lie)
    clock = ManualClock()
    async with start_front(clock=clock) as client:
        await train_with_points(client, clock, 4)
        assert min(kept_segments(client.front)) == 1
        error = (await client.status()).error
        assert error is not None
        assert (error.code, "masters" in error.message) == ("digest_mismatch", True)


async def test_above_its_cap_the_journal_keeps_results_and_lets_their_segments_go(
    start_front,
) -> None:
    """A client that never fetches must not hold the journal for hours."""
    clock = ManualClock()
    async with start_front(clock=clock, journal_cap_bytes=2048, crash=True) as client:
        model = await client.model()
        unfetched = await client.forward_backward(model, 1)
        for number in range(6):
            await client.result(await client.optim_step(model, 2 + 2 * number))
            await client.result(await client.forward_backward(model, 3 + 2 * number))
        assert len(client.events("recovery_point")) > 2, "the cap brings them, not the clock"
        digest = await client.digest()
    async with start_front(clock=clock, journal_cap_bytes=2048) as client:
        assert min(kept_segments(client.front)) > 1
        first = await client.result(unfetched)
        assert "error" not in first
    async with start_front(clock=clock) as client:
        assert await client.result(unfetched) == first
        await client.result(await client.forward(model, 14))
        assert await client.digest() == digest


async def test_below_its_cap_a_result_to_fetch_keeps_its_segment(start_front) -> None:
    clock = ManualClock()
    async with start_front(clock=clock) as client:
        model = await client.model()
        await client.forward_backward(model, 1)
        for number in range(4):
            await client.result(await client.optim_step(model, 2 + number))
            clock.advance(1000)
        assert min(kept_segments(client.front)) == 1


def a_point(directory: Path) -> Path:
    weights = directory / "policy.masters.safetensors"
    weights.write_bytes(b"weights" * 100)
    record = {"format": 1, "slots": [], "files": {weights.name: file_entry(weights)}}
    (directory / RECORD_FILE).write_bytes(msgspec.json.encode(record))
    return weights


def test_a_point_is_whole_or_the_damaged_file_is_named(tmp_path: Path) -> None:
    weights = a_point(tmp_path)
    verify_point(tmp_path)
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(DigestMismatch, match="is not what was written"):
        verify_point(tmp_path)
    weights.unlink()
    with pytest.raises(DigestMismatch, match="cannot be read back"):
        verify_point(tmp_path)
