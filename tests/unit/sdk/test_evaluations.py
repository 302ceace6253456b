"""What a record keeps of its completions, and the requests that make them again."""

from __future__ import annotations

import hashlib

import pytest

from homefire.sdk import SampledCompletion, WeightsIdentity
from homefire.sdk.evaluations import (
    check_same_weights,
    completions_sha256,
    prompts_of,
    request_options,
)

ONE = SampledCompletion("b", [1, 2, 3], 2, weights=WeightsIdentity("s1", "abcdef"))
TWO = SampledCompletion("", [4], 1, weights=WeightsIdentity("s1", ""))


def test_prompts_and_the_digest_of_what_was_answered():
    assert prompts_of([ONE, TWO]) == [[1, 2], [4]]
    expected = hashlib.sha256(b"[[3],[]]").hexdigest()
    assert completions_sha256([ONE, TWO]) == expected


@pytest.mark.parametrize("digest", ["", "abc", "abcdef", "abcdef99"])
def test_completions_of_the_named_weights_are_taken(digest):
    check_same_weights([ONE, TWO], identity="s1", digest=digest)


@pytest.mark.parametrize(("identity", "digest"), [("s2", "abc"), ("s1", "abd")])
def test_completions_of_other_weights_are_refused(identity, digest):
    with pytest.raises(ValueError, match="completion 0 was made by"):
        check_same_weights([ONE], identity=identity, digest=digest)


def test_a_request_is_made_again_with_its_seed():
    sampling = {"temperature": 1.0, "max_tokens": 4, "seed": "index of the prompt", "note": "x"}
    assert request_options(sampling, index=3) == {"temperature": 1.0, "max_tokens": 4, "seed": 3}
    greedy = {"temperature": 0, "max_tokens": 4}
    assert request_options(greedy, index=3) == greedy


@pytest.mark.parametrize(
    ("sampling", "reason"),
    [
        ({}, "max_tokens"),
        ({"max_tokens": 4}, "temperature"),
        ({"max_tokens": 4, "temperature": 0.7}, "without a seed"),
        ({"max_tokens": 4, "temperature": 0.7, "seed": "time"}, "without a seed"),
    ],
)
def test_what_cannot_be_sampled_again_says_why(sampling, reason):
    with pytest.raises(ValueError, match=reason):
        request_options(sampling, index=0)
