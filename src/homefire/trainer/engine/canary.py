"""What a snapshot's manifest says of the canary, scored when it is saved."""

from __future__ import annotations

import math

import numpy as np

from homefire.checkpoints.canary import canary_tokens
from homefire.trainer.engine.network import FrozenWeights, Network, PackedTargets
from homefire.trainer.engine.slots import Committed, Slot
from homefire.wire.manifest import Canary

Logprobs = tuple[float, ...]


class CanaryProbe:
    """Of one engine. It remembers the base model's answer, which a first snapshot is told apart from."""

    def __init__(self, network: Network, max_context_length: int) -> None:
        self._tokens = canary_tokens(network.vocab_size, max_context_length)
        self._shares = (1, *[0] * (network.num_ranks - 1))
        self._compute_dtype = network.compute_dtype
        self._of_base: Logprobs | None = None

    def note_base(self, weights: FrozenWeights) -> None:
        """`weights` are still the base model's, as those of every fresh slot."""
        if self._of_base is None:
            self._of_base = self._score(weights)

    def score(self, slot: Slot) -> Logprobs | None:
        """None where the live weights give nothing finite."""
        logprobs = self._score(slot.weights)
        return logprobs if all(map(math.isfinite, logprobs)) else None

    def canary(self, scored: Logprobs, parent: Committed | None) -> Canary:
        """Of a snapshot whose weights gave `scored`; `parent` is the one before it."""
        return Canary(self._tokens, scored, self._of_parent(parent), self._compute_dtype)

    def _of_parent(self, parent: Committed | None) -> Logprobs | None:
        if parent is None:
            return self._of_base
        canary = parent.manifest.canary
        return None if canary is None else canary.logprobs

    def _score(self, weights: FrozenWeights) -> Logprobs:
        tokens = np.array(self._tokens, np.int64)
        row = PackedTargets(
            tokens, [len(tokens)], np.roll(tokens, -1)[:, None], shares=self._shares
        )
        return tuple(float(value) for value in weights.logprobs(row)[:-1, 0])
