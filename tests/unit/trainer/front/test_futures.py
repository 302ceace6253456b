from __future__ import annotations

import pytest

from homefire.foundation.clock import ManualClock
from homefire.trainer.front import futures as module
from homefire.trainer.front.futures import RETENTION_S, UNREAD_RETENTION_S, Futures
from homefire.trainer.front.records import PlainResult, encode_result

RESULT = PlainResult({"type": "x"})


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def futures(clock: ManualClock) -> Futures:
    return Futures(clock)


def resolve(futures: Futures, clock: ManualClock, name: str, *, segment: int = 1) -> None:
    futures.expect(name)
    futures.resolve(name, encode_result(RESULT), at=clock.now(), segment=segment)


def test_a_result_wakes_who_waits_and_may_be_read_again(
    futures: Futures, clock: ManualClock
) -> None:
    futures.expect("r")
    completion = futures.completion("r")
    assert futures.read("r") is None
    futures.resolve("r", encode_result(RESULT), at=clock.now())
    assert completion.is_set()
    assert futures.read("r") == futures.read("r") == RESULT
    assert not futures.is_pending("r")


def test_read_results_are_forgotten_after_a_while_and_unread_ones_much_later(
    futures: Futures, clock: ManualClock
) -> None:
    resolve(futures, clock, "read")
    resolve(futures, clock, "unread", segment=2)
    futures.read("read")
    clock.advance(RETENTION_S + 1)
    assert futures.forget_old() == ["read"]
    assert futures.oldest_segment() == 2
    clock.advance(UNREAD_RETENTION_S)
    assert futures.forget_old() == ["unread"]
    assert futures.oldest_segment() is None


def test_beyond_the_byte_bound_read_results_go_early_and_unread_ones_stay(
    futures: Futures, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_RESULT_BYTES", 1)
    resolve(futures, clock, "read")
    resolve(futures, clock, "unread")
    futures.read("read")
    assert futures.forget_old() == ["read"]
    assert futures.is_known("unread")


def test_a_result_that_was_past_its_retention_when_the_journal_was_read_is_not_kept(
    futures: Futures, clock: ManualClock
) -> None:
    futures.expect("old")
    futures.resolve("old", encode_result(RESULT), at=clock.now() - UNREAD_RETENTION_S - 1)
    assert not futures.is_known("old")
