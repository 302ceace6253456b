"""The fake engine's pooled embeddings and their gradient."""

from __future__ import annotations

import numpy as np
import pytest

from homefire.model import bigram
from homefire.trainer.engine.bigram_weights import BigramFull, BigramLora
from homefire.trainer.engine.network import PackedTokens
from homefire.wire.engine import LoraSpec
from homefire.wire.pass_extras import Pooling

BATCH = PackedTokens(np.array([1, 2, 1, 5]), [3, 1])


def weights_of(kind):
    base = bigram.base_weight(8)
    if kind == "full":
        return BigramFull(base)
    weights = BigramLora(base, LoraSpec(rank=2, seed=1), "tiny")
    weights._masters[bigram.LORA_B] += 0.1
    return weights


@pytest.mark.parametrize("pooling", list(Pooling))
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_gradient_equals_finite_differences(kind, pooling):
    weights = weights_of(kind)
    slope = np.random.default_rng(0).standard_normal((2, 8)).astype(np.float32)
    weights.embedding_backward(BATCH, pooling, slope)
    for name, gradient in weights._aside.items():
        for index in [(1, 1), (0, 1)]:
            values = []
            for step in (0.5, -0.5):  # the map is linear or bilinear: any step is exact
                weights._masters[name][index] += np.float32(step)
                values.append(float((weights.embeddings(BATCH, pooling) * slope).sum()))
                weights._masters[name][index] -= np.float32(step)
            # A full slot computes with bfloat16 rounding: three digits.
            assert gradient[index] == pytest.approx(values[0] - values[1], rel=1e-2, abs=2e-3)


def test_pooling_by_mean_and_by_last_token():
    weights = weights_of("full")
    states = weights._logits(BATCH)
    mean, last = (weights.embeddings(BATCH, pooling) for pooling in (Pooling.MEAN, Pooling.LAST))
    np.testing.assert_allclose(mean[0], states[:3].mean(0), rtol=1e-6)
    assert last.tolist() == [states[2].tolist(), states[3].tolist()]
