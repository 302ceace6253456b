"""A rank's own part of a pass, which never leaves the other ranks waiting.

Out of memory in the middle, a rank catches up with the others (`pass_collectives.py`) and raises
OutOfMemory when they are all at the end: nothing has been kept by then, so the request fails alone, or is
tried once more. A rank that has no memory for catching up either cannot go on: EngineUnusable.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

import numpy as np

from homefire.trainer.engine.network import (
    Float32,
    FrozenWeights,
    Ints,
    PackedTargets,
    PackedTokens,
    TrainableWeights,
)
from homefire.trainer.engine.protocol import EngineUnusable
from homefire.trainer.engine.ranks.pass_collectives import PassCollectives
from homefire.wire.errors import OutOfMemory
from homefire.wire.pass_extras import Pooling

Output = TypeVar("Output")


class Exchange(Protocol):
    """The middle of a backward, where all ranks meet."""

    def gradient_of(self, logprobs: Float32) -> Float32:
        """d loss / d logprobs, or the error for which all ranks give up."""
        ...

    def give_up(self, error: OutOfMemory) -> Float32:
        """Instead of `gradient_of`: this rank has no logprobs. Raises."""
        ...


class RankPasses:
    def __init__(self, collectives: PassCollectives) -> None:
        self._collectives = collectives

    @property
    def rank(self) -> int:
        return self._collectives.rank

    def logprobs(self, weights: FrozenWeights, batch: PackedTargets) -> Float32:
        token = _a_token_with_targets(batch)
        return self._run(lambda: weights.logprobs(batch), lambda: weights.logprobs(token))

    def likeliest(
        self, weights: FrozenWeights, batch: PackedTokens, count: int
    ) -> tuple[Float32, Ints]:
        token = _a_token(batch)
        return self._run(
            lambda: weights.likeliest(batch, count), lambda: weights.likeliest(token, count)
        )

    def embeddings(self, weights: FrozenWeights, batch: PackedTokens, pooling: Pooling) -> Float32:
        token = _a_token(batch)
        return self._run(
            lambda: weights.embeddings(batch, pooling), lambda: weights.embeddings(token, pooling)
        )

    def embedding_backward(
        self, weights: TrainableWeights, batch: PackedTokens, pooling: Pooling, gradient: Float32
    ) -> Float32:
        token, nothing = _a_token(batch), np.zeros_like(gradient[:1])
        return self._run(
            lambda: weights.embedding_backward(batch, pooling, gradient),
            lambda: weights.embedding_backward(token, pooling, nothing),
        )

    def backward(
        self, weights: TrainableWeights, batch: PackedTargets, exchange: Exchange
    ) -> Float32:
        middle = _Middle(exchange)
        try:
            self._collectives.begin()
            return weights.backward(batch, middle.gradient_of)
        except OutOfMemory as exc:
            if middle.has_given_up:
                raise
            error = self._named(exc)
        token = _a_token_with_targets(batch)
        try:
            self._collectives.begin_again()
            weights.backward(token, lambda logprobs: middle.without_gradient(logprobs, error))
        except OutOfMemory:
            if middle.has_given_up:
                raise
            raise self._stuck(error) from None
        raise error

    def _run(self, run: Callable[[], Output], catch_up: Callable[[], Output]) -> Output:
        self._collectives.begin()
        try:
            return run()
        except OutOfMemory as exc:
            error = self._named(exc)
        try:
            self._collectives.begin_again()
            catch_up()
        except OutOfMemory:
            raise self._stuck(error) from None
        raise error

    def _stuck(self, error: OutOfMemory) -> EngineUnusable:
        """To answer with an error would leave the others waiting for collectives that never come."""
        return EngineUnusable(f"{error.message}; nor is there memory for the rest of the pass")

    def _named(self, error: OutOfMemory) -> OutOfMemory:
        """Without the traceback, whose frames hold what has to be freed now."""
        message = f"rank {self.rank}: {error.message}"
        return OutOfMemory(message, hint=error.hint)


class _Middle:
    """Whether this rank's pass has come as far as the exchange."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._is_passed = False
        self.has_given_up = False
        """All ranks have, together: there is nothing to catch up with."""

    def gradient_of(self, logprobs: Float32) -> Float32:
        self.has_given_up = True
        gradient = self._exchange.gradient_of(logprobs)
        self.has_given_up = False
        self._is_passed = True
        return gradient

    def without_gradient(self, logprobs: Float32, error: OutOfMemory) -> Float32:
        if self._is_passed:
            return np.zeros_like(logprobs)
        self.has_given_up = True
        return self._exchange.give_up(error)


def _a_token(batch: PackedTokens) -> PackedTokens:
    """Its layers are recomputed as the batch's are: the collectives come in the same order."""
    return PackedTokens(batch.tokens[:1], [1], recompute=batch.recompute)


def _a_token_with_targets(batch: PackedTargets) -> PackedTargets:
    return PackedTargets(batch.tokens[:1], [1], batch.targets[:1], recompute=batch.recompute)
