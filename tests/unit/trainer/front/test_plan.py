from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from homefire.trainer.front.plan import execution_plan, micro_batches, recomputed_layers
from homefire.wire.specs import ActivationBudget

LENGTHS = st.lists(st.integers(0, 50), max_size=40)
RANKS = st.integers(1, 4)


@given(LENGTHS, st.integers(1, 100), RANKS)
def test_every_row_is_planned_once_and_no_share_of_several_rows_exceeds_the_budget(
    lengths: list[int], budget: int, ranks: int
) -> None:
    batches = micro_batches(lengths, token_budget=budget, ranks=ranks)
    shares = [rows for batch in batches for rows in batch]
    assert sorted(row for rows in shares for row in rows) == list(range(len(lengths)))
    assert all(len(batch) == ranks for batch in batches)
    for rows in shares:
        assert len(rows) <= 1 or sum(lengths[row] for row in rows) <= budget


@given(LENGTHS, st.integers(1, 100))
def test_rows_run_from_the_longest_to_the_shortest(lengths: list[int], budget: int) -> None:
    plan = execution_plan(lengths, token_budget=budget, threads=1)
    order = [row for rows in plan.micro_batches for row in rows]
    assert [lengths[row] for row in order] == sorted(lengths, reverse=True)


def test_rows_of_equal_length_keep_their_order() -> None:
    assert micro_batches([4, 4, 4], token_budget=8) == [[[0, 1]], [[2]]]


def test_a_plan_of_one_rank_says_nothing_of_ranks() -> None:
    assert execution_plan([4, 4], token_budget=8, threads=1).shares == []


def test_a_row_goes_to_the_rank_with_the_fewest_tokens() -> None:
    plan = execution_plan([2, 7, 4, 3], token_budget=10, threads=1, ranks=2)
    assert (plan.micro_batches, plan.shares) == ([[1, 0, 2, 3]], [[2, 2]])


def test_a_rank_may_have_no_row() -> None:
    assert execution_plan([5], token_budget=10, threads=1, ranks=3).shares == [[1, 0, 0]]


@given(LENGTHS, st.integers(1, 100), RANKS)
def test_the_shares_of_a_micro_batch_add_up_to_its_rows(
    lengths: list[int], budget: int, ranks: int
) -> None:
    plan = execution_plan(lengths, token_budget=budget, threads=1, ranks=ranks)
    if ranks > 1:
        assert [sum(s) for s in plan.shares] == [len(rows) for rows in plan.micro_batches]


BUDGETS = st.builds(
    ActivationBudget,
    max_bytes=st.integers(0, 100_000),
    layer_token_bytes=st.integers(20, 200),
    input_token_bytes=st.integers(1, 19),
    num_layers=st.integers(1, 12),
)


def kept_bytes(num_tokens: int, recomputed: int, budget: ActivationBudget) -> int:
    whole = (budget.num_layers - recomputed) * budget.layer_token_bytes
    return num_tokens * (whole + recomputed * budget.input_token_bytes)


@given(st.integers(1, 500), BUDGETS)
def test_the_fewest_layers_are_recomputed_that_keep_a_pass_within_its_budget(
    num_tokens: int, budget: ActivationBudget
) -> None:
    found = recomputed_layers(num_tokens, budget)
    if found < budget.num_layers:
        assert kept_bytes(num_tokens, found, budget) <= budget.max_bytes
    if found > 0:
        assert kept_bytes(num_tokens, found - 1, budget) > budget.max_bytes


def test_only_micro_batches_over_the_budget_are_recomputed() -> None:
    budget = ActivationBudget(
        max_bytes=5000, layer_token_bytes=100, input_token_bytes=10, num_layers=8
    )
    plan = execution_plan([10, 3, 2], token_budget=6, threads=1, activations=budget)
    assert plan.micro_batches == [[0], [1, 2]]
    assert plan.recompute == [4, 0]
    assert execution_plan([3, 2], token_budget=6, threads=1, activations=budget).recompute == []


def test_the_largest_share_of_a_rank_decides() -> None:
    budget = ActivationBudget(
        max_bytes=4000, layer_token_bytes=100, input_token_bytes=10, num_layers=8
    )
    plan = execution_plan([10, 3], token_budget=10, threads=1, ranks=2, activations=budget)
    assert plan.shares == [[1, 1]]
    assert plan.recompute == [5]
