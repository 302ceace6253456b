from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from homefire.trainer.front import validation
from homefire.trainer.front.validation import Batch, Limits, check_batch
from homefire.wire import errors
from homefire.wire.json_numbers import token_bytes
from homefire.wire.tinker import Pass, Row, TensorValue

LIMITS = Limits(vocab_size=10, max_context_length=4)


def ints(*values: Any, shape: tuple[int, ...] | None = None) -> TensorValue:
    return value(np.array(values, dtype=np.int64), "int64", shape)


def floats(*values: Any, shape: tuple[int, ...] | None = None) -> TensorValue:
    return value(np.array(values, dtype=np.float32), "float32", shape)


def value(array: np.ndarray, dtype: str, shape: tuple[int, ...] | None) -> TensorValue:
    return TensorValue(dtype, shape or array.shape, array.tobytes())


def row(tokens: list[int], **inputs: TensorValue) -> Row:
    return Row(token_bytes(tokens), inputs)


def check(*rows: Row, loss_fn: str = "cross_entropy", **config: float | str) -> Batch:
    return check_batch(Pass(rows=list(rows), loss_fn=loss_fn, loss_fn_config=config), LIMITS)


def test_rows_are_packed_end_to_end() -> None:
    batch = check(
        row([1, 2], target_tokens=ints(2, 3), weights=floats(0.5, -1.0)),
        row([4], target_tokens=ints(5)),
    )
    arrays = batch.arrays
    assert arrays["tokens"].tolist() == [1, 2, 4]
    assert arrays["lengths"].tolist() == [2, 1]
    assert arrays["target_tokens"].tolist() == [[2], [3], [5]]
    assert arrays["weights"].tolist() == [[0.5], [-1.0], [1.0]]
    assert [arrays[name].dtype.name for name in arrays] == ["int32", "int32", "int64", "float32"]
    assert batch.shapes == [(2,), (1,)]


def test_rows_with_fewer_targets_are_padded_with_weightless_ones_and_cut_back() -> None:
    batch = check(
        row([1], target_tokens=ints(2)),
        row([3, 4], target_tokens=ints(1, 2, 3, 4, 5, 6, shape=(2, 3))),
    )
    assert batch.arrays["target_tokens"].tolist() == [[2, 0, 0], [1, 2, 3], [4, 5, 6]]
    assert batch.arrays["weights"].tolist() == [[1, 0, 0], [1, 1, 1], [1, 1, 1]]
    logprobs = np.arange(9, dtype=np.float32).reshape(3, 3)
    cut = batch.unpack({"logprobs": logprobs})["logprobs"]
    assert [row.tolist() for row in cut.rows()] == [[0], [[3, 4, 5], [6, 7, 8]]]


def test_the_likeliest_tokens_are_cut_by_row() -> None:
    body = Pass(
        rows=[row([1, 2], target_tokens=ints(2, 3)), row([4], target_tokens=ints(5))],
        loss_fn="cross_entropy",
        loss_fn_config={"top_k": 2.0},
        forward_only=True,
    )
    reply = {"top_k_indices": np.arange(6).reshape(3, 2)}
    cut = check_batch(body, LIMITS).unpack(reply)["top_k_indices"]
    assert cut.dtype == "int64"
    assert [r.tolist() for r in cut.rows()] == [[[0, 1], [2, 3]], [[4, 5]]]


def test_an_answer_of_too_many_likeliest_tokens_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(validation, "MAX_TOP_ELEMENTS", 5)
    rows = [row([1, 2], target_tokens=ints(2, 3)), row([4], target_tokens=ints(5))]
    body = Pass(
        rows=rows, loss_fn="cross_entropy", loss_fn_config={"top_k": 2.0}, forward_only=True
    )
    with pytest.raises(errors.InvalidArgument, match="top_k 2 of 3 tokens"):
        check_batch(body, LIMITS)


def embedding_pass(*rows: Row, forward_only: bool = False, **config: float | str) -> Batch:
    config = {"output": "embedding", "pooling": "mean", **config}
    body = Pass(
        rows=list(rows), loss_fn="cross_entropy", loss_fn_config=config, forward_only=forward_only
    )
    return check_batch(body, LIMITS)


def test_an_embedding_pass_takes_rows_without_targets() -> None:
    batch = embedding_pass(row([1, 2]), row([4], target_tokens=ints(5)), forward_only=True)
    assert batch.arrays.keys() == {"tokens", "lengths"}
    cut = batch.unpack({"embedding": np.ones((2, 3), np.float32)})["embedding"]
    assert cut.shapes == [(3,), (3,)]


def test_embedding_gradients_are_stacked() -> None:
    rows = [row([1], embedding_grads=floats(1, 2)), row([1, 2], embedding_grads=floats(3, 4))]
    assert embedding_pass(*rows).arrays["embedding_grads"].tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("rows", "config", "error", "message"),
    [
        ([row([1])], {}, errors.InvalidArgument, r"data\[0\].*embedding_grads is missing"),
        (
            [row([1], embedding_grads=floats(1)), row([1], embedding_grads=floats(1, 2))],
            {},
            errors.LengthMismatch,
            r"data\[1\].*2 values, the first datum's 1",
        ),
        ([row([1])], {"pooling": "max"}, errors.InvalidArgument, "pooling is 'max'"),
        ([row([1])], {"output": "projection"}, errors.Unsupported, "projection"),
        ([row([1])], {"output": "logits"}, errors.InvalidArgument, "output is 'logits'"),
        ([row([1])], {"beta": 0.1}, errors.InvalidArgument, "'beta'"),
        (
            [row([1])] * 3,
            {"output": "contrastive_loss", "num_queries": 2.0, "temperature": 0.1},
            errors.InvalidArgument,
            "needs 4 datums, not 3",
        ),
        (
            [row([1])] * 2,
            {"output": "contrastive_loss", "num_queries": 1.5, "temperature": 0.1},
            errors.InvalidArgument,
            "num_queries is 1.5",
        ),
        (
            [row([1])] * 2,
            {"output": "contrastive_loss", "num_queries": 1, "temperature": 0.0},
            errors.InvalidArgument,
            "temperature is 0",
        ),
    ],
)
def test_what_is_wrong_with_an_embedding_pass_is_named(
    rows: list[Row], config: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        embedding_pass(*rows, **config)


def test_rl_inputs_and_per_token_thresholds_are_flat() -> None:
    rl = {"logprobs": floats(-1.0), "advantages": floats(2.0)}
    batch = check(
        row([1], target_tokens=ints(2), **rl),
        row([1], target_tokens=ints(2), clip_low_threshold=floats(0.5), **rl),
        loss_fn="ppo",
        clip_low_threshold=0.7,
    )
    assert batch.arrays["logprobs"].tolist() == [-1.0, -1.0]
    assert batch.arrays["clip_low_threshold"].tolist() == pytest.approx([0.7, 0.5])
    assert "clip_high_threshold" not in batch.arrays


def test_a_row_without_a_sequence_mask_marks_its_advantages() -> None:
    rl = {"logprobs": floats(-1.0, -1.0), "advantages": floats(0.0, 2.0)}
    batch = check(
        row([1, 2], target_tokens=ints(2, 3), **rl),
        row([1, 2], target_tokens=ints(2, 3), sequence_ratio_mask=floats(1, 1), **rl),
        loss_fn="gspo",
        clip_low_threshold=0.9,
        clip_high_threshold=1.1,
    )
    assert batch.arrays["sequence_ratio_mask"].tolist() == [0, 1, 1, 1]


def test_cross_entropy_ignores_inputs_that_it_does_not_know() -> None:
    assert "mask" not in check(row([1], target_tokens=ints(2), mask=floats(1.0))).arrays


RL = {"logprobs": floats(-1.0), "advantages": floats(2.0)}
NAN = float("nan")


@pytest.mark.parametrize(
    ("rows", "loss_fn", "config", "error", "message"),
    [
        ([], "cross_entropy", {}, errors.InvalidArgument, "data is empty"),
        ([row([1])], "cross_entropy", {}, errors.InvalidArgument, "lacks 'target_tokens'"),
        ([row([], target_tokens=ints())], "cross_entropy", {}, errors.InvalidArgument, "no tokens"),
        (
            [row([1, 2], target_tokens=ints(3))],
            "cross_entropy",
            {},
            errors.LengthMismatch,
            r"data\[0\].*1 targets.*2 tokens",
        ),
        (
            [row([1], target_tokens=ints(2), weights=floats(1, 1))],
            "cross_entropy",
            {},
            errors.LengthMismatch,
            "weights has shape",
        ),
        (
            [row([1], target_tokens=ints(2)), row([10], target_tokens=ints(2))],
            "cross_entropy",
            {},
            errors.TokenOutOfRange,
            r"data\[1\].*token 10 at 0",
        ),
        (
            [row([1], target_tokens=ints(-1))],
            "cross_entropy",
            {},
            errors.TokenOutOfRange,
            "target_tokens has token -1",
        ),
        (
            [row([1 << 40], target_tokens=ints(2))],
            "cross_entropy",
            {},
            errors.TokenOutOfRange,
            "token",
        ),
        (
            [row([1] * 5, target_tokens=ints(*[1] * 5))],
            "cross_entropy",
            {},
            errors.SequenceTooLong,
            "5 tokens.*is 4",
        ),
        (
            [row([1], target_tokens=ints(2), weights=floats(NAN))],
            "cross_entropy",
            {},
            errors.InvalidArgument,
            "NaN",
        ),
        (
            [row([1], target_tokens=floats(2))],
            "cross_entropy",
            {},
            errors.InvalidArgument,
            "use int64",
        ),
        (
            [row([1], target_tokens=ints(2))],
            "cross_entropy",
            {"top_k": 5.0},
            errors.InvalidArgument,
            "top_k",
        ),
        ([row([1], target_tokens=ints(2))], "foo", {}, errors.UnknownLoss, "cross_entropy"),
        ([row([1], target_tokens=ints(2))], "dppo", {}, errors.Unsupported, "dppo"),
        ([row([1], target_tokens=ints(2))], "dro", {}, errors.InvalidArgument, "beta"),
        ([row([1], target_tokens=ints(2), **RL)], "gspo", {}, errors.InvalidArgument, "clip_low"),
        (
            [
                row([1], target_tokens=ints(2), clip_low_threshold=floats(1), **RL),
                row([1], target_tokens=ints(2), **RL),
            ],
            "dapo",
            {"clip_high_threshold": 1.2},
            errors.InvalidArgument,
            "dapo needs .*clip_low",
        ),
        ([row([1], target_tokens=ints(2))], "ppo", {}, errors.InvalidArgument, "lacks 'logprobs'"),
        (
            [row([1], target_tokens=ints(2), mask=floats(1), **RL)],
            "importance_sampling",
            {},
            errors.InvalidArgument,
            "'mask'.*zero advantages",
        ),
        (
            [row([1], target_tokens=ints(2, shape=(1, 1)), **RL)],
            "ppo",
            {},
            errors.InvalidArgument,
            "one target per token",
        ),
        (
            [row([1], target_tokens=ints(2), **RL)],
            "ppo",
            {"clip_low_threshold": "low"},
            errors.InvalidArgument,
            "finite number",
        ),
        (
            [Row(token_bytes([1]), {"target_tokens": ints(2)}, ["image"])],
            "cross_entropy",
            {},
            errors.Unsupported,
            "image",
        ),
    ],
)
def test_what_is_wrong_is_named(
    rows: list[Row], loss_fn: str, config: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        check(*rows, loss_fn=loss_fn, **config)
