"""A rank out of memory catches up with the others, or says that it cannot."""

from __future__ import annotations

import numpy as np
import pytest

from homefire.trainer.engine.network import PackedTargets
from homefire.trainer.engine.protocol import EngineUnusable
from homefire.trainer.engine.ranks.rank_passes import RankPasses
from homefire.wire.errors import OutOfMemory

BATCH = PackedTargets(np.arange(5), [2, 3], np.arange(5)[:, None], recompute=2)


class Collectives:
    rank = 1

    def __init__(self) -> None:
        self.calls: list[str] = []

    def begin(self) -> None:
        self.calls.append("begin")

    def begin_again(self) -> None:
        self.calls.append("begin again")


class Weights:
    """Out of memory in the first `failures` passes, before the exchange or behind it."""

    def __init__(self, failures: int, *, behind: bool = False) -> None:
        self._failures = failures
        self._behind = behind
        self.batches: list[PackedTargets] = []

    def logprobs(self, batch):
        self.batches.append(batch)
        self._compute()
        return np.zeros(batch.targets.shape, np.float32)

    def backward(self, batch, gradient_of):
        self.batches.append(batch)
        if not self._behind:
            self._compute()
        gradient = gradient_of(np.ones(batch.targets.shape, np.float32))
        self._compute()
        return gradient

    def _compute(self) -> None:
        if self._failures:
            self._failures -= 1
            raise OutOfMemory("no room")


class Exchange:
    def __init__(self) -> None:
        self.given_up: list[str] = []

    def gradient_of(self, logprobs):
        return logprobs

    def give_up(self, error):
        self.given_up.append(error.message)
        raise OutOfMemory("everybody's")


@pytest.fixture
def collectives() -> Collectives:
    return Collectives()


@pytest.fixture
def passes(collectives) -> RankPasses:
    return RankPasses(collectives)


def test_a_forward_catches_up_with_one_token_recomputed_like_the_rest(passes, collectives) -> None:
    weights = Weights(failures=1)
    with pytest.raises(OutOfMemory, match="rank 1: no room"):
        passes.logprobs(weights, BATCH)
    assert collectives.calls == ["begin", "begin again"]
    token = weights.batches[1]
    assert (len(token.tokens), token.lengths, token.recompute) == (1, [1], 2)


def test_a_backward_that_breaks_before_the_exchange_gives_up_there(passes) -> None:
    exchange = Exchange()
    with pytest.raises(OutOfMemory, match="everybody's"):
        passes.backward(Weights(failures=1), BATCH, exchange)
    assert exchange.given_up == ["rank 1: no room"]


def test_a_backward_that_breaks_behind_the_exchange_comes_to_its_end(passes) -> None:
    weights, exchange = Weights(failures=1, behind=True), Exchange()
    with pytest.raises(OutOfMemory, match="rank 1: no room"):
        passes.backward(weights, BATCH, exchange)
    assert len(weights.batches) == 2
    assert exchange.given_up == []


@pytest.mark.parametrize("behind", [False, True])
def test_a_rank_without_memory_for_catching_up_ends(passes, behind) -> None:
    """An answer would leave the others waiting."""
    with pytest.raises(EngineUnusable, match="rank 1: no room; nor is there memory for the rest"):
        passes.backward(Weights(failures=2, behind=behind), BATCH, Exchange())
    with pytest.raises(EngineUnusable, match="nor is there memory for the rest"):
        passes.logprobs(Weights(failures=2), BATCH)
