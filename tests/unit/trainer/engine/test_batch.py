from __future__ import annotations

import numpy as np
import pytest

from homefire.trainer.engine.batch import micro_batches, read_batch
from homefire.wire.engine import ExecutionPlan
from homefire.wire.errors import (
    InvalidArgument,
    LengthMismatch,
    SequenceTooLong,
    TokenOutOfRange,
)


@pytest.fixture
def arrays():
    return {
        "tokens": np.arange(9, dtype=np.int32),
        "lengths": np.array([2, 4, 3], np.int32),
        "target_tokens": np.arange(9, dtype=np.int64) + 1,
        "weights": np.ones(9, np.float32),
    }


def read(arrays):
    return read_batch(arrays, vocab_size=10, max_context_length=4)


@pytest.mark.parametrize(
    ("name", "value", "error", "named"),
    [
        ("tokens", np.arange(8), LengthMismatch, "lengths sum to 9"),
        ("lengths", np.array([2, 7]), SequenceTooLong, "row 1 has 7 tokens"),
        ("lengths", np.array([4, 0, 5]), InvalidArgument, "at least one token"),
        ("lengths", np.array([], np.int64), InvalidArgument, "at least one row"),
        ("tokens", np.array([0, 1, 2, 3, 4, 5, 10, 0, 0]), TokenOutOfRange, "row 2 has token 10"),
        ("target_tokens", np.array([0, 0, -1] + [0] * 6), TokenOutOfRange, "row 1 has target"),
        ("weights", np.ones(5), LengthMismatch, "weights"),
    ],
)
def test_a_wrong_batch_is_refused_by_row_and_name(arrays, name, value, error, named):
    with pytest.raises(error, match=named):
        read({**arrays, name: value})


def test_targets_are_needed(arrays):
    del arrays["target_tokens"]
    with pytest.raises(InvalidArgument, match="target_tokens"):
        read(arrays)


def test_micro_batches_hold_their_rows_in_the_plans_order(arrays):
    cuts = list(micro_batches(read(arrays), ExecutionPlan(micro_batches=[[2, 0], [1]], threads=1)))
    assert [cut.batch.tokens.tolist() for cut in cuts] == [[6, 7, 8, 0, 1], [2, 3, 4, 5]]
    assert [cut.batch.lengths.tolist() for cut in cuts] == [[3, 2], [4]]
    assert [cut.batch.row_ids.tolist() for cut in cuts] == [[2, 0], [1]]
    assert cuts[0].places.tolist() == [6, 7, 8, 0, 1]
    assert cuts[0].batch.targets[:, 0].tolist() == [7, 8, 9, 1, 2]


@pytest.mark.parametrize("rows", [[[0, 1]], [[0, 1], [1, 2]], [[0, 1, 2, 3]]])
def test_a_plan_names_every_row_once(arrays, rows):
    plan = ExecutionPlan(micro_batches=rows, threads=1)
    with pytest.raises(InvalidArgument, match="plan"):
        list(micro_batches(read(arrays), plan))


def test_a_span_keeps_the_pieces_of_the_rows_that_it_cuts(arrays):
    batch = read(arrays)
    part = batch.span(slice(1, 7))
    assert part.lengths.tolist() == [1, 4, 1]
    assert part.tokens.tolist() == [1, 2, 3, 4, 5, 6]
    assert part.inputs["weights"].shape == (6, 1)
    assert part.place_in_row(0) == 1
    assert part.place_in_row(5) == 0
    assert batch.span(slice(3, 5)).row_ids.tolist() == [1]
