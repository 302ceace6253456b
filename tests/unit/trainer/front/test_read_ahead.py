"""What comes next is decoded and packed beforehand, with the results that it would have had anyway."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from homefire.trainer.front import operations, read_ahead
from homefire.trainer.front.operations import OperationKind, RunPass
from homefire.trainer.front.read_ahead import ReadAhead
from homefire.trainer.front.sessions import Request
from homefire.trainer.front.validation import Limits, check_batch
from homefire.wire.errors import TokenOutOfRange
from homefire.wire.specs import TrainerMode
from homefire.wire.tinker import Pass, Row, TensorValue
from unit.trainer.front.test_packs import engine_busy

LIMITS = Limits(vocab_size=1 << 30, max_context_length=1 << 20)
LARGE, SMALL = 20_000, 4


def request(name: str, *, num_tokens: int = LARGE, first_token: int = 0) -> Request:
    tokens = np.random.default_rng(len(name)).integers(0, 1 << 29, num_tokens, dtype=np.int32)
    tokens[0] = first_token
    targets = TensorValue("int64", (num_tokens,), tokens.astype(np.int64).tobytes())
    row = Row(tokens.tobytes(), {"target_tokens": targets})
    packed = operations.pack(operations.encode(RunPass(Pass(rows=[row], loss_fn="cross_entropy"))))
    return Request(name, "model", 1, OperationKind.FORWARD_BACKWARD, packed, None, segment=1)


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What was prepared ahead, in order."""
    found: list[bytes] = []

    def noted(packed: bytes, limits: Limits) -> read_ahead.Prepared:
        found.append(packed)
        return PREPARE(packed, limits)

    monkeypatch.setattr(read_ahead, "prepare", noted)
    return found


PREPARE = read_ahead.prepare


@contextmanager
def reading() -> Iterator[ReadAhead]:
    ahead = ReadAhead(LIMITS)
    yield ahead
    ahead.close()


async def settle(ahead: ReadAhead) -> None:
    await asyncio.gather(*ahead._tasks.values(), return_exceptions=True)


async def test_a_large_pass_is_prepared_once_and_is_what_it_would_have_been(
    prepared: list[bytes],
) -> None:
    wanted = request("a")
    with reading() as ahead:
        ahead.begin([wanted])
        ahead.begin([wanted])
        operation = await ahead.operation(wanted)
        assert isinstance(operation, RunPass)
        batch = await ahead.batch(wanted, operation)
    assert prepared == [wanted.operation]
    again = check_batch(operation.body, LIMITS)
    assert batch.shapes == again.shapes
    assert {name: array.tobytes() for name, array in batch.arrays.items()} == {
        name: array.tobytes() for name, array in again.arrays.items()
    }


async def test_what_is_wrong_comes_out_at_its_turn() -> None:
    wrong = request("a", first_token=-1)
    with reading() as ahead:
        ahead.begin([wrong])
        await settle(ahead)
        operation = await ahead.operation(wrong)
        assert isinstance(operation, RunPass)
        for _ in range(2):
            with pytest.raises(TokenOutOfRange, match="token -1"):
                await ahead.batch(wrong, operation)


async def test_small_passes_and_those_beyond_the_bound_wait_for_their_turn(
    prepared: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, small = request("a"), request("bb"), request("c", num_tokens=SMALL)
    monkeypatch.setattr(read_ahead, "MAX_AHEAD_BYTES", len(first.operation) + 1)
    with reading() as ahead:
        ahead.begin([small, first, second])
        await settle(ahead)
        assert prepared == [first.operation]
        for late in (small, second):
            operation = await ahead.operation(late)
            assert isinstance(operation, RunPass)
            assert (await ahead.batch(late, operation)).num_rows == 1
    assert prepared == [first.operation]


async def test_what_no_longer_comes_next_is_forgotten() -> None:
    first, second = request("a"), request("bb")
    with reading() as ahead:
        ahead.begin([first])
        ahead.begin([second])
        assert list(ahead._tasks) == ["bb"]


async def test_the_next_pass_is_prepared_while_the_engine_is_busy(
    start_front, prepared: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_ahead, "_WORTH_IT_ABOVE", 0)
    async with start_front(mode=TrainerMode.LORA) as client:
        model = (await client.create(await client.session(), lora_config={"rank": 4}))["model_id"]
        async with engine_busy(client, model, 1):
            before = len(prepared)
            requests = [await client.forward_backward(model, seq) for seq in (2, 3)]
            await settle(client.front.worker.model.ahead)
            assert len(prepared) == before + 1  # one after the one that runs, not all that wait
        for request in requests:
            assert (await client.result(request))["metrics"]["tokens:sum"] > 0
        assert len(prepared) == before + 2
