"""Both engines' AdamW against the formula in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from homefire.trainer.engine.adamw import AdamW, Served, gradient_norms, norm_of
from homefire.trainer.engine.bigram_weights import Moments
from homefire.trainer.engine.gradient_norms import GradientNorms
from homefire.wire.engine import AdamParams
from homefire.wire.errors import NonFiniteGradient

PARAMS = st.builds(
    AdamParams,
    learning_rate=st.floats(1e-6, 1e-1),
    beta1=st.floats(0, 0.99),
    beta2=st.floats(0, 0.999),
    eps=st.sampled_from([1e-12, 1e-8, 1e-3]),
    weight_decay=st.sampled_from([0.0, 0.1]),
    grad_clip_norm=st.sampled_from([0.0, 0.5]),
)


def reference(w, gradients, params, divisor):
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t, gradient in enumerate(gradients, 1):
        g = gradient.astype(np.float64) / divisor
        if params.grad_clip_norm:
            g = g * min(1.0, params.grad_clip_norm / (np.linalg.norm(g) + 1e-6))
        m = params.beta1 * m + (1 - params.beta1) * g
        v = params.beta2 * v + (1 - params.beta2) * g * g
        m_hat, v_hat = m / (1 - params.beta1**t), v / (1 - params.beta2**t)
        w = w - params.learning_rate * (
            m_hat / (np.sqrt(v_hat) + params.eps) + params.weight_decay * w
        )
    return w


def gradients_of(seed, num_steps):
    """[num_steps, 12], over six orders of magnitude."""
    generator = np.random.default_rng(seed)
    scale = 10.0 ** generator.integers(-3, 3, (num_steps, 12))
    return (generator.standard_normal((num_steps, 12)) * scale).astype(np.float32)


@settings(max_examples=100, deadline=None)
@given(params=PARAMS, seed=st.integers(0, 1000), divisor=st.sampled_from([1.0, 7.0]))
def test_the_torch_optimizer_equals_the_formula(params, seed, divisor):
    gradients = gradients_of(seed, 4)
    start = np.linspace(-1, 1, 12, dtype=np.float32)
    masters = {"w": torch.from_numpy(start.copy())}
    adam = AdamW(masters)
    for gradient in gradients:
        named = {"w": torch.from_numpy(gradient)}
        scale = gradient_norms(named, divisor).clipping(params) / divisor
        adam.step(masters, named, params, scale=scale)
    expected = reference(start.astype(np.float64), gradients, params, divisor)
    np.testing.assert_allclose(masters["w"].numpy(), expected, rtol=1e-5, atol=2e-6)


@settings(max_examples=50, deadline=None)
@given(params=PARAMS, seed=st.integers(0, 1000))
def test_the_fakes_optimizer_equals_the_formula(params, seed):
    gradients = gradients_of(seed, 4)
    start = np.linspace(-1, 1, 12, dtype=np.float32)
    masters = {"w": start.copy()}
    moments = Moments(masters)
    for gradient in gradients:
        norms = GradientNorms({"w": float(np.linalg.norm(gradient.astype(np.float64)))})
        scale = norms.clipping(params)
        moments.step(masters, {"w": gradient}, params, scale)
    expected = reference(start.astype(np.float64), gradients, params, 1.0)
    np.testing.assert_allclose(masters["w"], expected, rtol=1e-5, atol=2e-6)


def test_it_is_torchs_adamw():
    gradients = torch.from_numpy(gradients_of(0, 5))
    masters = {"w": torch.linspace(-1, 1, 12)}
    theirs = torch.nn.Parameter(masters["w"].clone())
    optimizer = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    adam = AdamW(masters)
    params = AdamParams(learning_rate=1e-2, eps=1e-8, weight_decay=0.1)
    for gradient in gradients:
        theirs.grad = gradient.clone()
        optimizer.step()
        adam.step(masters, {"w": gradient}, params, scale=1.0)
    torch.testing.assert_close(masters["w"], theirs.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e20])
def test_a_gradient_that_cannot_be_squared_names_its_parameter(value):
    gradient = {"fine": torch.ones(3), "broken": torch.tensor([0.0, value])}
    with pytest.raises(NonFiniteGradient, match="'broken'"):
        gradient_norms(gradient, 1.0).check()


def served(masters):
    return {name: master.bfloat16().float() for name, master in masters.items()}


@pytest.mark.parametrize("shape", [(300, 512), (70_000,), (3, 100_000), (0, 4), ()])
def test_a_step_in_pieces_is_a_step_in_one(shape, monkeypatch):
    """Bits of weights and moments, the norm of what was added, and the count of moved values."""
    generator = torch.Generator().manual_seed(0)
    start, gradient = (torch.randn(shape, generator=generator) for _ in range(2))
    params = AdamParams(learning_rate=1e-4, weight_decay=0.1)
    found = []
    for piece in (1 << 16, 1 << 30):
        monkeypatch.setattr("homefire.trainer.engine.pieces._PIECE", piece)
        masters = {"w": start.clone()}
        adam, live = AdamW(masters), served(masters)
        for _ in range(2):
            update = adam.step(
                masters, {"w": gradient}, params, scale=0.5, served=Served(live, torch.bfloat16)
            )
        assert torch.equal(live["w"], served(masters)["w"])
        found.append((masters["w"], adam.first["w"], adam.second["w"], update))
    for in_pieces, in_one in zip(found[0][:3], found[1][:3], strict=True):
        assert torch.equal(in_pieces, in_one)
    assert found[0][3].num_moved == found[1][3].num_moved
    assert found[0][3].norm == pytest.approx(found[1][3].norm, rel=1e-5)


def test_a_step_says_what_it_added_and_how_many_served_values_moved():
    start = torch.linspace(-1, 1, 1000)
    masters = {"w": start.clone()}
    live = served(masters)
    before = live["w"].clone()
    update = AdamW(masters).step(
        masters,
        {"w": torch.ones(1000)},
        AdamParams(learning_rate=1e-3),
        scale=1.0,
        served=Served(live, torch.bfloat16),
    )
    assert update.norm == pytest.approx(float((masters["w"] - start).norm()), rel=1e-5)
    assert update.num_moved == int((live["w"] != before).sum())
    assert 0 < update.num_moved < 1000


@pytest.mark.parametrize("size", [1e-25, 1e-18, 1.0, 1e18])
def test_norms_are_right_where_float32_squares_are_not(size):
    tensor = torch.full((300, 512), size)
    assert norm_of(tensor) == pytest.approx(size * math.sqrt(300 * 512), rel=1e-5)
