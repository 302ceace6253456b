"""Our losses against references short enough to trust by eye, in float64, value and gradient."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from homefire.trainer.engine.batch import read_batch
from homefire.trainer.engine.losses import evaluate, loss_function
from homefire.wire.errors import NonFiniteGradient
from homefire.wire.losses import LOSSES

LOGPROBS = tuple(np.linspace(-30, 0, 61))
"""Ratios of e**30 either way."""
EXTREME_LOGPROBS = (0.0, -1.0, -80.0, -710.0, -1e4, -1e30)
REALS = (-3.0, -1.0, -0.3, 1e-3, 0.5, 1.0, 2.7)


def cross_entropy(p, x, rows):
    return (-p * x["weights"]).sum()


def ratio(p, x, cap=torch.inf):
    return torch.exp((p - x["logprobs"]).clamp(-cap, cap))


def importance_sampling(p, x, rows, ratio_log_cap=torch.inf):
    return -(ratio(p, x, ratio_log_cap) * x["advantages"]).sum()


def surrogate(r, x, low, high):
    return torch.minimum(r * x["advantages"], r.clamp(low, high) * x["advantages"])


def ppo(p, x, rows, clip_low_threshold=0.8, clip_high_threshold=1.2, ratio_log_cap=torch.inf):
    low, high = thresholds(x, clip_low_threshold, clip_high_threshold)
    return -surrogate(ratio(p, x, ratio_log_cap), x, low, high).sum()


def cispo(p, x, rows, clip_low_threshold=0.8, clip_high_threshold=1.2, ratio_log_cap=torch.inf):
    low, high = thresholds(x, clip_low_threshold, clip_high_threshold)
    return -(ratio(p, x, ratio_log_cap).clamp(low, high).detach() * p * x["advantages"]).sum()


def dro(p, x, rows, beta=0.05):
    return -(p * x["advantages"] - beta / 2 * (p - x["logprobs"]) ** 2).sum()


def gspo(p, x, rows, clip_low_threshold=0.9, clip_high_threshold=1.3, seq_ratio_log_cap=torch.inf):
    loss = 0
    low, high = thresholds(x, *column_like(p, clip_low_threshold, clip_high_threshold))
    mask = x.get("sequence_ratio_mask", x["advantages"])
    for row in rows:
        mine = {name: column[row] for name, column in x.items()}
        marked = mask[row] != 0
        log_ratios = torch.where(marked, (p[row] - mine["logprobs"]).detach(), 0.0)
        # Summed by numpy, as ours: of differences like 1e30 and 1, the order decides what is left.
        log_s = torch.tensor(log_ratios.numpy().sum()) / max(1, int(marked.sum()))
        moves = log_s <= seq_ratio_log_cap
        token = torch.exp(p[row] - p[row].detach()) if moves else 1 + 0 * p[row]
        r = torch.exp(log_s.clamp(max=seq_ratio_log_cap)) * token
        loss = loss - surrogate(r, mine, low[row], high[row]).sum()
    return loss


def dapo(
    p,
    x,
    rows,
    clip_low_threshold=0.8,
    clip_high_threshold=1.28,
    eps_clip_c=torch.inf,
    ratio_log_cap=torch.inf,
):
    low, high = thresholds(x, clip_low_threshold, clip_high_threshold)
    loss = -surrogate(ratio(p, x, ratio_log_cap), x, low, high)
    capped = torch.minimum(
        loss, torch.where(x["advantages"] < 0, -eps_clip_c * x["advantages"], torch.inf)
    )
    return capped.sum()


def thresholds(x, low, high):
    return x.get("clip_low_threshold", low), x.get("clip_high_threshold", high)


def column_like(p, *values):
    return [torch.full_like(p, value).detach() for value in values]


CLIP = {"clip_low_threshold": 0.7, "clip_high_threshold": 1.5}
GSPO = {"clip_low_threshold": 0.9, "clip_high_threshold": 1.3}
PER_TOKEN = ("clip_low_threshold", "clip_high_threshold")
CASES = [
    (cross_entropy, {}, ()),
    (importance_sampling, {}, ()),
    (importance_sampling, {"ratio_log_cap": 2.0}, ()),
    (ppo, {}, ()),
    (ppo, CLIP, ()),
    (ppo, {**CLIP, "ratio_log_cap": 3.0}, ()),
    (ppo, CLIP, PER_TOKEN),
    (cispo, {}, ()),
    (cispo, CLIP, PER_TOKEN),
    (cispo, {**CLIP, "ratio_log_cap": 3.0}, ()),
    (dro, {"beta": 0.05}, ()),
    (gspo, GSPO, ("sequence_ratio_mask",)),
    (gspo, GSPO, ()),
    (gspo, {**GSPO, "seq_ratio_log_cap": 0.2}, ("sequence_ratio_mask",)),
    (gspo, {}, (*PER_TOKEN, "sequence_ratio_mask")),
    (dapo, CLIP, ()),
    (dapo, {**CLIP, "ratio_log_cap": 3.0}, ()),
    (dapo, {}, PER_TOKEN),
    (dapo, {**CLIP, "eps_clip_c": 3.0}, ()),
]


@st.composite
def batches(draw, logprobs):
    """Logprobs [T, 1] and every input of every loss; some tokens masked."""
    lengths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    generator = np.random.default_rng(draw(st.integers(0, 1 << 32)))
    total = sum(lengths)

    def column(values):
        return generator.choice(values, total).astype(np.float32)

    masked = column([0, 1, 1])
    inputs = {
        "weights": column(REALS) * masked,
        "advantages": column(REALS) * masked,
        "logprobs": column(logprobs),
        "clip_low_threshold": column([0, 0.3, 0.8, 1]),
        "clip_high_threshold": column([1, 1.2, 2.5, 9]),
        "sequence_ratio_mask": np.maximum(column([0, 1]), masked),
    }
    arrays = {
        "tokens": np.zeros(total, np.int32),
        "lengths": np.array(lengths, np.int32),
        "target_tokens": np.zeros(total, np.int64),
    }
    return column(logprobs)[:, None], arrays, inputs


def batch_of(arrays, inputs, per_token=()):
    chosen = {
        name: column
        for name, column in inputs.items()
        if name in ("weights", "advantages", "logprobs", *per_token)
    }
    return read_batch({**arrays, **chosen}, vocab_size=2, max_context_length=64)


def reference_of(reference, logprobs, batch, config):
    """Value and gradient, by autograd."""
    p = torch.from_numpy(logprobs.astype(np.float64)).requires_grad_()
    x = {name: torch.from_numpy(column.astype(np.float64)) for name, column in batch.inputs.items()}
    loss = reference(p, x, batch.rows(), **config)
    (gradient,) = torch.autograd.grad(loss, p)
    return loss.item(), gradient.numpy()


def test_every_loss_has_a_reference():
    assert {reference.__name__ for reference, _, _ in CASES} == LOSSES.keys()


@pytest.mark.parametrize("name", LOSSES)
def test_every_key_of_a_config_and_every_input_has_a_case(name):
    mine = [(config, inputs) for reference, config, inputs in CASES if reference.__name__ == name]
    assert {key for config, _ in mine for key in config} == set(LOSSES[name].config)
    optional = set(LOSSES[name].optional) - {"weights"}
    assert {each for _, inputs in mine for each in inputs} == optional


@pytest.mark.parametrize(("reference", "config", "per_token"), CASES)
@settings(max_examples=80, deadline=None)
@given(case=batches(LOGPROBS))
def test_value_and_gradient_equal_the_reference(reference, config, per_token, case):
    logprobs, arrays, inputs = case
    batch = batch_of(arrays, inputs, per_token)
    terms = evaluate(loss_function(reference.__name__, config), logprobs, batch)
    value, gradient = reference_of(reference, logprobs, batch, config)
    # Terms may cancel: a sum is as exact as the largest of them.
    largest = max(1.0, float(np.abs(terms.value).max(initial=0.0)))
    np.testing.assert_allclose(terms.value.sum(), value, rtol=1e-12, atol=1e-12 * largest)
    np.testing.assert_allclose(terms.gradient, gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("reference", "config", "per_token"), CASES)
@settings(max_examples=60, deadline=None)
@given(case=batches(EXTREME_LOGPROBS))
def test_ratios_beyond_any_float_are_exact_or_refused_by_row(reference, config, per_token, case):
    logprobs, arrays, inputs = case
    batch = batch_of(arrays, inputs, per_token)
    value, gradient = reference_of(reference, logprobs, batch, config)
    with np.errstate(over="ignore", invalid="ignore"):
        is_finite = np.isfinite(value) and np.isfinite(gradient.astype(np.float32)).all()
    try:
        terms = evaluate(loss_function(reference.__name__, config), logprobs, batch)
    except NonFiniteGradient:
        assert not is_finite
        return
    assert np.isfinite(terms.gradient.astype(np.float32)).all()
    if is_finite:
        size = np.abs(terms.value).sum()
        np.testing.assert_allclose(terms.value.sum(), value, rtol=1e-12, atol=1e-12 * size)
    else:
        assert np.isfinite(terms.value).all()


@pytest.mark.parametrize(
    ("reference", "config", "mistake"),
    [
        (ppo, CLIP, {**CLIP, "clip_high_threshold": 1.6}),
        (cispo, CLIP, {**CLIP, "clip_low_threshold": 0.6}),
        (dro, {"beta": 0.05}, {"beta": 0.1}),
        (gspo, GSPO, {**GSPO, "clip_high_threshold": 1.2}),
        (dapo, {**CLIP, "eps_clip_c": 3.0}, CLIP),
    ],
)
def test_a_planted_mistake_in_the_reference_is_seen(reference, config, mistake):
    arrays = {
        "tokens": np.zeros(4, np.int32),
        "lengths": np.array([2, 2], np.int32),
        "target_tokens": np.zeros(4, np.int64),
    }
    inputs = {
        "advantages": np.array([1, 1, -1, -1], np.float32),
        "logprobs": np.array([-3, -3, -5, -0.5], np.float32),
    }
    batch = batch_of(arrays, inputs)
    logprobs = np.array([[-1], [-3], [-1], [-2]], np.float32)
    ours = evaluate(loss_function(reference.__name__, config), logprobs, batch).value.sum()
    assert ours == pytest.approx(reference_of(reference, logprobs, batch, config)[0], rel=1e-12)
    assert abs(ours - reference_of(reference, logprobs, batch, mistake)[0]) > 0.01


# Many targets of a token ------------------------------------------------------------------------

WEIGHTS = st.one_of(
    st.just(0.0),
    st.sampled_from([1.0, -1.0, 1e30, -1e30, 1e-30]),
    st.floats(-1e4, 1e4, width=32),
)


@st.composite
def weighted_targets(draw):
    """Logprobs and weights [T, K] of 1 to 3 rows; where a weight is 0, what it weighs is anything."""
    lengths = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    shape = sum(lengths), draw(st.integers(1, 4))
    size = shape[0] * shape[1]
    weights = draw(st.lists(WEIGHTS, min_size=size, max_size=size))
    values = st.sampled_from(EXTREME_LOGPROBS[:-1])
    logprobs = [draw(values) if weight else draw(ANYTHING) for weight in weights]
    return (
        np.array(logprobs, np.float32).reshape(shape),
        np.array(weights, np.float32).reshape(shape),
        np.array(lengths, np.int32),
    )


ANYTHING = st.sampled_from([-1.0, -np.inf, np.nan])


@settings(max_examples=150, deadline=None)
@given(case=weighted_targets())
def test_cross_entropy_sums_over_every_target_with_any_real_weight(case):
    logprobs, weights, lengths = case
    arrays = {
        "tokens": np.zeros(len(weights), np.int32),
        "lengths": lengths,
        "target_tokens": np.zeros(weights.shape, np.int64),
        "weights": weights,
    }
    batch = read_batch(arrays, vocab_size=2, max_context_length=8)
    terms = evaluate(loss_function("cross_entropy", {}), logprobs, batch)
    counted = np.where(weights != 0, logprobs, np.float32(0))
    value, gradient = reference_of(cross_entropy, counted, batch, {})
    size = np.abs(terms.value).sum()
    np.testing.assert_allclose(terms.value.sum(), value, rtol=0, atol=1e-12 * size)
    np.testing.assert_array_equal(terms.gradient, gradient)
