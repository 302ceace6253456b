"""The scorer that the quickstart's evaluations name."""

from __future__ import annotations

import pytest

from homefire.quickstart.rescoring import score
from homefire.quickstart.task import held_out_prompts, solve


def test_the_score_is_that_of_the_answers_in_the_order_of_the_prompts(completion):
    prompts = held_out_prompts()
    right = [completion(text=solve(prompt)) for prompt in prompts]
    assert score(right) == {"reward": 1.0}
    wrong = [completion(text="x"), *right[1:]]
    assert score(wrong) == {"reward": 1.0 - 1 / len(prompts)}
    cut_off = [completion(text=solve(prompts[0]), finish_reason="length"), *right[1:]]
    assert score(cut_off) == score(wrong)
    with pytest.raises(ValueError, match="shorter"):
        score(right[:-1])
