"""The torch sampler against a ten-line reference, and against chance itself.

Significance: each chi-square test has a fixed seed and rejects at 0.001 (the limit is the 99.9 %
quantile, Wilson-Hilferty), so a right sampler fails one in a thousand choices of the seed.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from homefire.inference.engine import fake
from homefire.inference.engine.adjustments import AdjustedTokens, adjustments_of
from homefire.inference.engine.protocol import Sampling
from homefire.inference.engine.sampler import inverse_cdf, sample, sampling_logprobs
from homefire.inference.engine.sampling_plan import SamplingPlan

VOCABULARY = 50
NUM_DRAWS = 20_000
Z_999 = 3.0902


def logits_of(seed: int, rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 2


samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.01]),
    top_k=st.sampled_from([0, 1, 3, 20, 500]),
    min_p=st.sampled_from([0.0, 0.05, 0.9]),
)


@given(chosen=st.lists(samplings, min_size=1, max_size=5), seed=st.integers(0, 1000))
def test_the_sampled_distribution_is_the_reference_s(chosen: list[Sampling], seed: int) -> None:
    logits = logits_of(seed, len(chosen))
    plan = SamplingPlan.of(chosen, [0] * len(chosen))
    ours = sampling_logprobs(logits, plan).double().exp().numpy()
    for row, sampling in enumerate(chosen):
        reference = np.exp(fake.sampling_logprobs(logits[row].double().numpy(), sampling))
        np.testing.assert_allclose(ours[row], reference, atol=1e-6)


penalised = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.7, 1.0]),
    top_k=st.sampled_from([0, 3]),
    presence_penalty=st.sampled_from([0.0, -1.0, 1.5]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    repetition_penalty=st.sampled_from([1.0, 0.8, 1.3]),
    logit_bias=st.dictionaries(st.integers(0, 9), st.sampled_from([-100.0, -1.0, 2.0])).map(
        lambda biases: tuple(biases.items())
    ),
)
texts = st.lists(st.integers(0, 9), max_size=12)


def adjusted_by_hand(
    logits: torch.Tensor, sampling: Sampling, prompt: list[int], drawn: list[int]
) -> np.ndarray:
    """The definition, token by token: bias, repetition, then frequency and presence."""
    adjusted = logits.double().numpy().copy()
    for token in range(VOCABULARY):
        adjusted[token] += dict(sampling.logit_bias).get(token, 0.0)
        if token in prompt or token in drawn:
            is_positive = adjusted[token] > 0
            adjusted[token] *= sampling.repetition_penalty ** (-1 if is_positive else 1)
        adjusted[token] -= sampling.frequency_penalty * drawn.count(token)
        adjusted[token] -= sampling.presence_penalty * (token in drawn)
    return adjusted


@given(
    rows=st.lists(st.tuples(penalised, texts, texts), min_size=1, max_size=4),
    seed=st.integers(0, 99),
)
def test_penalties_and_biases_are_their_definition(
    rows: list[tuple[Sampling, list[int], list[int]]], seed: int
) -> None:
    logits = logits_of(seed, len(rows))
    kept = logits.clone()
    changed: list[AdjustedTokens | None] = []
    for sampling, prompt, drawn in rows:
        changed.append(AdjustedTokens(sampling, prompt) if sampling.adjusts else None)
        for token in drawn if sampling.adjusts else ():
            changed[-1].draw(token)
    plan = SamplingPlan.of([sampling for sampling, _, _ in rows], [0] * len(rows))
    plan = plan.adjusted(adjustments_of(changed))
    ours = sampling_logprobs(logits, plan).double().exp().numpy()
    for row, (sampling, prompt, drawn) in enumerate(rows):
        by_hand = adjusted_by_hand(logits[row], sampling, prompt, drawn)
        fakes = fake.adjusted(logits[row].double().numpy(), plan.adjustments, row)
        np.testing.assert_allclose(fakes, by_hand, atol=1e-5)
        reference = np.exp(fake.sampling_logprobs(by_hand, sampling))
        np.testing.assert_allclose(ours[row], reference, atol=2e-6)
    draws = sample(logits, plan, np.full(len(rows), 0.5))
    raw = logits.log_softmax(-1)[torch.arange(len(rows)), torch.tensor(draws.tokens)]
    assert draws.logprobs == pytest.approx(raw.tolist(), abs=1e-6)
    assert torch.equal(logits, kept)


@given(chosen=samplings, seed=st.integers(0, 1000), uniform=st.floats(0, 1, exclude_max=True))
def test_a_token_that_was_cut_off_is_never_drawn(
    chosen: Sampling, seed: int, uniform: float
) -> None:
    plan = SamplingPlan.of([chosen], [0])
    draws = sample(logits_of(seed), plan, np.array([uniform]))
    assert math.isfinite(draws.sampling_logprobs[0])


def test_the_ends_of_the_uniform_stay_inside_the_support() -> None:
    logprobs = torch.tensor([[-math.inf, math.log(0.5), -math.inf, math.log(0.5), -math.inf]] * 2)
    drawn = inverse_cdf(logprobs, torch.tensor([0.0, math.nextafter(1.0, 0.0)]).double())
    assert drawn.tolist() == [1, 3]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.7),
        Sampling(top_p=0.8),
        Sampling(top_k=10),
        Sampling(temperature=1.5, top_p=0.9, top_k=30, min_p=0.02),
    ],
    ids=str,
)
def test_frequencies_follow_the_distribution(sampling: Sampling) -> None:
    logits = logits_of(seed=7)
    plan = SamplingPlan.of([sampling] * NUM_DRAWS, [0] * NUM_DRAWS)
    uniforms = np.random.Generator(np.random.PCG64(42)).random(NUM_DRAWS)
    draws = sample(logits.expand(NUM_DRAWS, -1), plan, uniforms)
    chances = np.exp(fake.sampling_logprobs(logits[0].double().numpy(), sampling))
    assert fits(np.bincount(draws.tokens, minlength=VOCABULARY), chances)


def test_the_test_of_frequencies_can_fail() -> None:
    logits = logits_of(seed=7)
    plan = SamplingPlan.of([Sampling(temperature=1.1)] * NUM_DRAWS, [0] * NUM_DRAWS)
    uniforms = np.random.Generator(np.random.PCG64(42)).random(NUM_DRAWS)
    draws = sample(logits.expand(NUM_DRAWS, -1), plan, uniforms)
    chances = np.exp(fake.sampling_logprobs(logits[0].double().numpy(), Sampling()))
    assert not fits(np.bincount(draws.tokens, minlength=VOCABULARY), chances)


def fits(counts: np.ndarray, chances: np.ndarray) -> bool:
    """Whether the counts fit; tokens expected fewer than 5 times are joined into one cell."""
    expected = chances * counts.sum()
    rare = expected < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(expected[~rare], expected[rare].sum())
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    statistic = ((observed - wanted) ** 2 / wanted).sum()
    degrees = len(wanted) - 1
    limit = degrees * (1 - 2 / (9 * degrees) + Z_999 * math.sqrt(2 / (9 * degrees))) ** 3
    return bool(statistic < limit)


def test_logprobs_are_raw_and_alternatives_are_the_likeliest() -> None:
    logits = logits_of(3, 4)
    plan = SamplingPlan.of([Sampling(temperature=0.5, top_k=5)] * 4, [0, 3, 0, 1])
    draws = sample(logits, plan, np.array([0.1, 0.4, 0.6, 0.9]))
    raw = logits.log_softmax(-1)
    for row, token in enumerate(draws.tokens):
        assert draws.logprobs[row] == pytest.approx(raw[row, token].item())
        assert draws.alternatives[row][0][0] == int(raw[row].argmax())
        assert [value for _, value in draws.alternatives[row]] == pytest.approx(
            raw[row].sort(descending=True).values[:3].tolist()
        )
