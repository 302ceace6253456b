"""What the fake engine keeps between a forward and its backward.

Axes: T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from homefire.trainer.engine.network import Float32, PackedTargets


class BigramGraph:
    """Implements `PassGraph`: what a bigram keeps are its log-softmaxed logits [T, V]."""

    def __init__(
        self,
        batch: PackedTargets,
        logits: Float32,
        accumulate: Callable[[PackedTargets, Float32], None],
    ) -> None:
        self._batch = batch
        self._logits: Float32 | None = logits
        self._accumulate = accumulate

    @property
    def logprobs(self) -> Float32:
        return np.take_along_axis(self._kept(), self._batch.targets, -1)

    @property
    def size_bytes(self) -> int:
        return 0 if self._logits is None else self._logits.nbytes

    @property
    def is_intact(self) -> bool:
        return self._logits is not None

    def backward(self, gradient: Float32) -> None:
        # d logprob_k / d logits = onehot(target_k) - softmax
        d_logits = -np.exp(self._kept()) * gradient.sum(-1, keepdims=True)
        rows = np.arange(len(self._batch.tokens))[:, None]
        np.add.at(d_logits, (rows, self._batch.targets), gradient)
        self.release()
        self._accumulate(self._batch, d_logits)

    def release(self) -> None:
        self._logits = None

    def _kept(self) -> Float32:
        if self._logits is None:
            raise RuntimeError("the graph is released or used up")
        return self._logits
