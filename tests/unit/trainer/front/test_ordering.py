from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from homefire.trainer.front.ordering import SequenceOrder


@given(st.permutations(range(1, 13)))
def test_any_order_of_arrival_runs_in_order_and_as_early_as_possible(arrivals: list[int]) -> None:
    order, ran = SequenceOrder(), []
    for arrived, seq in enumerate(arrivals):
        ran += order.arrive(seq, str(seq))
        present = set(arrivals[: arrived + 1])
        run_length = next(n for n in range(14) if n + 1 not in present)
        assert ran == [str(n) for n in range(1, run_length + 1)]
        missing = run_length + 1 if len(present) > run_length else None
        assert order.missing == missing
    assert ran == [str(seq) for seq in range(1, 13)]


@given(st.lists(st.integers(1, 30), unique=True), st.lists(st.integers(1, 30), unique=True))
def test_after_giving_up_everything_held_was_released_once_and_order_goes_on(
    before: list[int], after: list[int]
) -> None:
    order = SequenceOrder()
    ran = [request for seq in before for request in order.arrive(seq, str(seq))]
    ran += order.give_up()
    assert ran == [str(seq) for seq in sorted(before)]
    assert order.missing is None
    for seq in sorted(after):
        if seq >= order.next:
            ran += order.arrive(seq, str(seq))
    ran += order.give_up()
    assert ran == sorted(ran, key=int)
    assert len(ran) == len(set(ran))


def test_a_number_that_arrived_before_is_a_mistake_of_the_caller() -> None:
    order = SequenceOrder()
    order.arrive(1, "a")
    order.arrive(3, "c")
    for seq in (1, 3):
        with pytest.raises(ValueError, match="arrived before"):
            order.arrive(seq, "again")
