from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from homefire.trainer.front.plan import micro_batches

LENGTHS = st.lists(st.integers(0, 50), max_size=40)


@given(LENGTHS, st.integers(1, 100))
def test_every_row_is_planned_once_and_no_batch_of_several_rows_exceeds_the_budget(
    lengths: list[int], budget: int
) -> None:
    batches = micro_batches(lengths, token_budget=budget)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or sum(lengths[row] for row in batch) <= budget


@given(LENGTHS, st.integers(1, 100))
def test_rows_run_from_the_longest_to_the_shortest(lengths: list[int], budget: int) -> None:
    order = [row for batch in micro_batches(lengths, token_budget=budget) for row in batch]
    assert [lengths[row] for row in order] == sorted(lengths, reverse=True)


def test_rows_of_equal_length_keep_their_order() -> None:
    assert micro_batches([4, 4, 4], token_budget=8) == [[0, 1], [2]]
