"""Our losses against references short enough to trust by eye, in float64, value and gradient."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from homefire.trainer.engine.batch import read_batch
from homefire.trainer.engine.losses import evaluate, loss_function

REAL = st.floats(-3, 3, width=32)
LOGPROB = st.floats(-30, 0, width=32)
"""Ratios of e**30 either way."""


def cross_entropy(p, x):
    return (-p * x["weights"]).sum()


def importance_sampling(p, x):
    return -(torch.exp(p - x["logprobs"]) * x["advantages"]).sum()


def ppo(p, x, low=0.8, high=1.2):
    r = torch.exp(p - x["logprobs"])
    return -torch.minimum(r * x["advantages"], r.clamp(low, high) * x["advantages"]).sum()


REFERENCES = {
    "cross_entropy": cross_entropy,
    "importance_sampling": importance_sampling,
    "ppo": ppo,
}


@st.composite
def cases(draw):
    """Logprobs [T, 1] and inputs; some tokens masked."""
    lengths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    total = sum(lengths)

    def column(values):
        return np.array(draw(st.lists(values, min_size=total, max_size=total)), np.float32)

    masked = column(st.sampled_from([0, 1, 1]))
    inputs = {
        "weights": column(REAL) * masked,
        "advantages": column(REAL) * masked,
        "logprobs": column(LOGPROB),
    }
    arrays = {
        "tokens": np.zeros(total, np.int32),
        "lengths": np.array(lengths, np.int32),
        "target_tokens": np.zeros(total, np.int64),
        **inputs,
    }
    return column(LOGPROB)[:, None], read_batch(arrays, vocab_size=2, max_context_length=8)


@pytest.mark.parametrize("name", REFERENCES)
@settings(max_examples=150, deadline=None)
@given(case=cases())
def test_value_and_gradient_equal_the_reference(name, case):
    logprobs, batch = case
    terms = evaluate(loss_function(name, {}), logprobs, batch)
    p = torch.from_numpy(logprobs.astype(np.float64)).requires_grad_()
    inputs = {k: torch.from_numpy(v.astype(np.float64)) for k, v in batch.inputs.items()}
    loss = REFERENCES[name](p, inputs)
    (gradient,) = torch.autograd.grad(loss, p)
    np.testing.assert_allclose(terms.value.sum(), loss.item(), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(terms.gradient, gradient.numpy(), rtol=1e-12, atol=1e-12)


def test_a_planted_mistake_in_the_reference_is_seen():
    arrays = {
        "tokens": np.zeros(1, np.int32),
        "lengths": np.array([1], np.int32),
        "target_tokens": np.zeros(1, np.int64),
        "advantages": np.array([1], np.float32),
        "logprobs": np.array([-3], np.float32),
    }
    batch = read_batch(arrays, vocab_size=2, max_context_length=8)
    logprobs = np.array([[-1]], np.float32)
    ours = evaluate(loss_function("ppo", {}), logprobs, batch).value.sum()
    inputs = {k: torch.from_numpy(v) for k, v in batch.inputs.items()}
    mistaken = ppo(torch.from_numpy(logprobs), inputs, high=1.3).item()
    assert abs(ours - mistaken) > 0.05


@pytest.mark.parametrize("bounds", [(0.5, 1.1), (0.9, 3.0)])
def test_ppo_takes_its_bounds_from_the_config(bounds):
    generator = np.random.default_rng(0)
    arrays = {
        "tokens": np.zeros(50, np.int32),
        "lengths": np.array([50], np.int32),
        "target_tokens": np.zeros(50, np.int64),
        "advantages": generator.standard_normal(50).astype(np.float32),
        "logprobs": -generator.random(50).astype(np.float32),
    }
    batch = read_batch(arrays, vocab_size=2, max_context_length=50)
    logprobs = -generator.random((50, 1)).astype(np.float32)
    config = dict(zip(("clip_low_threshold", "clip_high_threshold"), bounds, strict=True))
    ours = evaluate(loss_function("ppo", config), logprobs, batch).value.sum()
    inputs = {k: torch.from_numpy(v.astype(np.float64)) for k, v in batch.inputs.items()}
    p = torch.from_numpy(logprobs.astype(np.float64))
    assert ours == pytest.approx(ppo(p, inputs, *bounds).item(), rel=1e-12)
