from __future__ import annotations

import asyncio
from typing import Any

import pytest

from homefire.foundation.clock import ManualClock
from homefire.inference.replica.tinker_futures import SampleFutures, StoredFailure, StoredSample
from homefire.wire.errors import DigestMismatch, Overloaded, SequenceReused, Unavailable
from homefire.wire.tinker_sampling import SampleOutput, WeightsName

OUTPUT = SampleOutput(sequences=[], weights=WeightsName("base", "d1", None))


def futures() -> SampleFutures:
    return SampleFutures("d", ManualClock())


async def ended(some: SampleFutures, request_id: str) -> None:
    completion = some.completion(request_id)
    assert completion is not None
    async with asyncio.timeout(20):
        await completion.wait()


async def succeed() -> SampleOutput:
    return OUTPUT


def failing(error: Exception) -> Any:
    async def sample() -> SampleOutput:
        raise error

    return sample


async def test_a_result_is_there_when_its_event_is_set() -> None:
    some = futures()
    request_id = some.start(succeed, ("s", 1), "x")
    assert some.num_pending == 1
    assert some.read(request_id) is None
    await ended(some, request_id)
    assert some.num_pending == 0
    assert some.read(request_id) == StoredSample(OUTPUT)


@pytest.mark.parametrize("steps", [0, 1])
async def test_a_cancelled_request_ends_even_before_its_first_step(steps: int) -> None:
    some, started = futures(), asyncio.Event()

    async def endless() -> SampleOutput:
        started.set()
        await asyncio.Event().wait()
        return OUTPUT

    request_id = some.start(endless, None, "x")
    for _ in range(steps):
        await started.wait()
    some.cancel(request_id)
    await ended(some, request_id)
    outcome = some.read(request_id)
    assert isinstance(outcome, StoredFailure)
    assert (outcome.error.category, some.num_pending) == ("user", 0)


@pytest.mark.parametrize("error", [Overloaded("full"), Unavailable("stopping")])
async def test_what_waiting_helps_is_forgotten_so_that_the_client_samples_again(
    error: Exception,
) -> None:
    some = futures()
    request_id = some.start(failing(error), ("s", 1), "x")
    await ended(some, request_id)
    assert some.completion(request_id) is None
    assert some.find(("s", 1), "x") is None


@pytest.mark.parametrize(
    ("error", "code"), [(DigestMismatch("torn"), "digest_mismatch"), (KeyError("x"), "internal")]
)
async def test_any_other_error_is_the_result(error: Exception, code: str) -> None:
    some = futures()
    request_id = some.start(failing(error), None, "x")
    await ended(some, request_id)
    outcome = some.read(request_id)
    assert isinstance(outcome, StoredFailure)
    assert (outcome.error.code, outcome.error.category) == (code, "server")


async def test_a_number_is_known_by_its_session_and_what_it_asked() -> None:
    some = futures()
    request_id = some.start(succeed, ("s", 1), "x")
    assert some.find(("s", 1), "x") == request_id
    assert some.find(("t", 1), "x") is None
    with pytest.raises(SequenceReused, match="seq_id 1"):
        some.find(("s", 1), "y")
    await some.stop()


async def test_stopping_ends_everything_that_runs() -> None:
    some = futures()

    async def endless() -> SampleOutput:
        await asyncio.Event().wait()
        return OUTPUT

    ids = [some.start(endless, None, "x") for _ in range(3)]
    await some.stop()
    assert all(some.read(request_id) is not None for request_id in ids)
    assert some.num_pending == 0
