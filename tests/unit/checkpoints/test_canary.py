from __future__ import annotations

import math

import pytest

from homefire.checkpoints.canary import COARSE_TOLERANCE, canary_tokens, judge, tolerance
from homefire.wire.errors import CanaryMismatch
from homefire.wire.internal import CanaryVerdict
from homefire.wire.manifest import Canary

OWN = (-1.0, -2.0, -3.0)


def canary(parent: tuple[float, ...] | None, dtype: str = "float32") -> Canary:
    return Canary((1, 2, 3, 4), OWN, parent, dtype)


def verdict(found: tuple[float, ...], parent: tuple[float, ...] | None, dtype: str = "float32"):
    return judge(canary(parent), found, compute_dtype=dtype, name="step-1")


def shifted(by: float) -> tuple[float, ...]:
    return (*OWN[:2], OWN[2] + by)


@pytest.mark.parametrize(
    ("parent", "expected"),
    [
        (shifted(1.1e-3), CanaryVerdict.PASS),
        (shifted(0.9e-3), CanaryVerdict.INCONCLUSIVE),
        (OWN, CanaryVerdict.INCONCLUSIVE),
        (None, CanaryVerdict.INCONCLUSIVE),
    ],
)
def test_a_pass_means_that_the_parent_would_not_have_passed(parent, expected):
    assert verdict(shifted(0.9e-4), parent) is expected


@pytest.mark.parametrize("by", [1.1e-4, -1.1e-4, math.nan, -math.inf])
def test_what_is_off_by_more_than_the_tolerance_is_a_mismatch_that_names_the_snapshot(by):
    with pytest.raises(CanaryMismatch, match=r"'step-1'.*off by"):
        verdict(shifted(by), None)


def test_a_mismatch_says_when_the_weights_answer_as_the_ones_before_them():
    with pytest.raises(CanaryMismatch, match="as the weights before it do"):
        verdict(shifted(1.0), shifted(1.0))


def test_another_number_of_logprobs_is_a_mismatch():
    with pytest.raises(CanaryMismatch):
        verdict(OWN[:2], None)


def test_the_coarser_of_two_dtypes_sets_the_tolerance():
    assert tolerance("float32", "bfloat16") == COARSE_TOLERANCE
    assert verdict(shifted(0.09), shifted(2.0), "bfloat16") is CanaryVerdict.PASS
    assert verdict(shifted(0.09), shifted(0.9), "bfloat16") is CanaryVerdict.INCONCLUSIVE


@pytest.mark.parametrize("vocab_size", [3, 320, 151_936])
def test_the_text_fits_every_vocabulary_and_context(vocab_size):
    tokens = canary_tokens(vocab_size, 8)
    assert len(tokens) == 8
    assert all(0 <= token < vocab_size for token in tokens)
    assert tokens == canary_tokens(vocab_size, 1 << 20)[:8]
