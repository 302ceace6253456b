from __future__ import annotations

import numpy as np
import pytest

from homefire.trainer.engine.network import PackedTargets, PackedTokens
from homefire.trainer.engine.ranks.row_shares import (
    divide,
    divide_rows,
    divide_tokens,
    join_rows,
    join_tokens,
)
from homefire.wire.errors import InvalidArgument

LENGTHS = [2, 3, 1]


def batch(*shares: int) -> PackedTargets:
    tokens = np.arange(6)
    return PackedTargets(tokens, LENGTHS, tokens[:, None] * 10, shares=shares)


def test_ranks_get_neighbouring_rows_in_their_order() -> None:
    first, second = divide(batch(2, 1), 2)
    assert (first.batch.tokens.tolist(), first.batch.lengths) == ([0, 1, 2, 3, 4], [2, 3])
    assert (second.batch.tokens.tolist(), second.targets().targets.tolist()) == ([5], [[50]])


def test_a_rank_without_rows_gets_one_that_counts_for_nothing() -> None:
    shares = divide(batch(3, 0), 2)
    assert (shares[1].batch.lengths, shares[1].num_rows, shares[1].num_tokens) == ([1], 0, 0)
    gradients = divide_tokens(np.ones((6, 1), np.float32), shares)
    assert gradients[1].tolist() == [[0.0]]
    found = [np.full((6, 1), 7.0), np.full((1, 1), 99.0)]
    assert join_tokens(found, shares).tolist() == [[7.0]] * 6


@pytest.mark.parametrize("shares", [(2, 1), (3, 0), (0, 3), (1, 2)])
def test_what_is_divided_and_joined_is_what_it_was(shares: tuple[int, int]) -> None:
    divided = divide(batch(*shares), 2)
    by_token = np.arange(6, dtype=np.float32)[:, None]
    by_row = np.arange(6, dtype=np.float32).reshape(3, 2)
    assert (join_tokens(divide_tokens(by_token, divided), divided) == by_token).all()
    assert (join_rows(divide_rows(by_row, divided), divided) == by_row).all()


@pytest.mark.parametrize("shares", [(), (3,), (1, 1), (1, 1, 1)])
def test_a_plan_for_other_ranks_is_refused(shares: tuple[int, ...]) -> None:
    with pytest.raises(InvalidArgument, match="the ranks, which are 2") as refused:
        divide(PackedTokens(np.arange(6), LENGTHS, shares=shares), 2)
    assert refused.value.field == "plan"
