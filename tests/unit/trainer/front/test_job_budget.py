from __future__ import annotations

from pathlib import Path

from homefire.trainer.front.job_budget import JobBudget
from homefire.wire.specs import ActivationBudget, PassBudget


def found(tokens: int) -> PassBudget:
    activations = ActivationBudget(
        max_bytes=4000, layer_token_bytes=100, input_token_bytes=10, num_layers=8
    )
    return PassBudget(micro_batch_tokens=tokens, activations=activations)


def test_a_job_is_cut_by_its_spec_until_an_engine_has_found_better(make_spec):
    Path(make_spec().job_dir).mkdir(parents=True, exist_ok=True)
    budget = JobBudget(make_spec(micro_batch_tokens=8))
    assert budget.plan([10, 3]).micro_batches == [[0], [1]]
    assert budget.plan([10, 3]).recompute == []
    budget.note(None)
    assert budget.micro_batch_tokens == 8
    budget.note(found(20))
    assert budget.micro_batch_tokens == 20
    assert budget.plan([10, 3]).micro_batches == [[0, 1]]
    assert budget.plan([10, 3]).recompute == [6]


def test_what_was_found_first_holds_for_all_engines_of_the_job(make_spec):
    Path(make_spec().job_dir).mkdir(parents=True, exist_ok=True)
    JobBudget(make_spec()).note(found(20))
    later = JobBudget(make_spec())
    later.note(found(99))
    assert later.micro_batch_tokens == 20
    assert JobBudget(make_spec()).micro_batch_tokens == 20
