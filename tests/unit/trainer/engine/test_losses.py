from __future__ import annotations

import numpy as np
import pytest

from homefire.trainer.engine.batch import read_batch
from homefire.trainer.engine.losses import evaluate, loss_function, metrics
from homefire.wire.errors import (
    InvalidArgument,
    LengthMismatch,
    NonFiniteGradient,
    UnknownLoss,
    Unsupported,
)
from homefire.wire.losses import LOSSES


def batch_of(num_tokens=4, **inputs):
    return read_batch(
        {
            "tokens": np.zeros(num_tokens, np.int32),
            "lengths": np.array([1, num_tokens - 1], np.int32),
            "target_tokens": np.zeros((num_tokens, 1), np.int64),
            **{name: np.asarray(value, np.float32) for name, value in inputs.items()},
        },
        vocab_size=10,
        max_context_length=100,
    )


def column(*values):
    return np.array(values, np.float32)[:, None]


def test_an_unknown_loss_names_the_known_ones():
    with pytest.raises(UnknownLoss, match="foo") as error:
        loss_function("foo", {})
    assert all(name in error.value.hint for name in LOSSES)


@pytest.mark.parametrize("name", ["stable_reinforce", "dppo", "reinforce", "custom"])
def test_losses_without_a_public_definition_are_refused_by_name(name):
    with pytest.raises(Unsupported, match=name) as error:
        loss_function(name, {})
    assert all(known in error.value.hint for known in LOSSES)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("cross_entropy", {"beta": 1.0}, "'beta', which cross_entropy does not take"),
        ("ppo", {"clip_low_threshold": "low"}, "clip_low_threshold is 'low'"),
        ("ppo", {"clip_low_threshold": -0.2}, "clip_low_threshold is -0.2"),
        ("dro", {}, "dro needs loss_fn_config 'beta'"),
        ("dro", {"beta": -1.0}, "beta is -1"),
        ("dapo", {"eps_clip_c": 1.0}, "eps_clip_c is 1"),
        ("importance_sampling", {"ratio_log_cap": float("nan")}, "ratio_log_cap is nan"),
    ],
)
def test_config_is_checked_by_name(name, config, message):
    with pytest.raises(InvalidArgument, match=message):
        loss_function(name, config)


@pytest.mark.parametrize("name", ["gspo", "dapo"])
def test_bounds_without_a_public_default_must_be_given(name):
    batch = batch_of(advantages=np.ones(4), logprobs=np.zeros(4))
    with pytest.raises(InvalidArgument, match=f"{name} needs .*clip_low_threshold"):
        evaluate(loss_function(name, {}), column(0, 0, 0, 0), batch)


def test_bounds_in_the_wrong_order_are_refused():
    batch = batch_of(advantages=np.ones(4), logprobs=np.zeros(4))
    loss = loss_function("ppo", {"clip_low_threshold": 1.3})
    with pytest.raises(InvalidArgument, match="clip_low_threshold is above"):
        evaluate(loss, column(0, 0, 0, 0), batch)


def test_the_sequence_ratio_is_of_the_marked_tokens_alone():
    """Rows of 1 and 3 tokens; the second row's ratio is exp((1 + 3) / 2), not of its other token."""
    batch = batch_of(
        advantages=[1, 0, 1, 1], logprobs=[-1, -9, -2, -4], sequence_ratio_mask=[1, 0, 1, 1]
    )
    bounds = {"clip_low_threshold": 0.0, "clip_high_threshold": 1e9}
    terms = evaluate(loss_function("gspo", bounds), column(-1, -1, -1, -1), batch)
    ratio = pytest.approx(-np.exp(2.0))
    assert terms.gradient[:, 0].tolist() == [-1.0, 0.0, ratio, ratio]


def test_a_mask_that_marks_nothing_of_a_row_with_advantages_is_refused():
    batch = batch_of(
        advantages=[1, 1, 1, 1], logprobs=np.zeros(4), sequence_ratio_mask=[1, 0, 0, 0]
    )
    bounds = {"clip_low_threshold": 0.9, "clip_high_threshold": 1.1}
    with pytest.raises(InvalidArgument, match="row 1 has advantages, but its sequence_ratio_mask"):
        evaluate(loss_function("gspo", bounds), column(0, 0, 0, 0), batch)


def test_absent_weights_count_as_one():
    terms = evaluate(loss_function("cross_entropy", {}), column(-1, -2, -3, -4), batch_of())
    assert terms.value.sum() == 10.0
    assert (terms.gradient == -1).all()


@pytest.mark.parametrize("missing", ["logprobs", "advantages"])
def test_reinforcement_losses_name_the_missing_input(missing):
    inputs = {"logprobs": np.zeros(4), "advantages": np.ones(4)}
    del inputs[missing]
    with pytest.raises(InvalidArgument, match=missing):
        evaluate(loss_function("ppo", {}), column(0, 0, 0, 0), batch_of(**inputs))


def test_inputs_of_another_width_are_refused():
    wide = batch_of(weights=np.ones((4, 2)))
    with pytest.raises(LengthMismatch, match="weights"):
        evaluate(loss_function("cross_entropy", {}), column(0, 0, 0, 0), wide)


def test_what_a_masked_token_holds_does_not_count():
    batch = batch_of(advantages=[1, 0, 0, 0], logprobs=[-1, np.nan, -np.inf, 500])
    terms = evaluate(loss_function("importance_sampling", {}), column(-1, -2, -3, -4), batch)
    assert terms.gradient[:, 0].tolist() == [-1, 0, 0, 0]
    assert terms.diagnostics["ratio:mean"] == 1.0


def test_a_loss_that_is_not_finite_names_row_and_token():
    batch = batch_of(advantages=[1, 1, 1, 1], logprobs=[-1, -1, -1, -1000])
    with pytest.raises(NonFiniteGradient, match="row 1 is -inf at token 2"):
        evaluate(loss_function("importance_sampling", {}), column(-1, -1, -1, -1), batch)


def test_per_token_bounds_win_over_the_config():
    batch = batch_of(
        advantages=[1, 1, 1, 1],
        logprobs=[0, 0, 0, 0],
        clip_low_threshold=[0.1] * 4,
        clip_high_threshold=[1.1, 1.1, 9.0, 9.0],
    )
    loss = loss_function("ppo", {"clip_high_threshold": 1.2})
    terms = evaluate(loss, column(1, 0, 1, 0), batch)
    assert terms.gradient[0, 0] == 0.0
    assert terms.gradient[2, 0] == pytest.approx(-np.e)
    assert metrics(terms)["clip_fraction:mean"] == 0.25


@pytest.mark.parametrize("name", LOSSES)
def test_every_metric_names_a_reduction_that_clients_know(name):
    batch = batch_of(weights=np.ones((4, 1)), advantages=np.ones(4), logprobs=np.zeros(4))
    given = {"beta": 0.1, "clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
    config = {key: value for key, value in given.items() if key in LOSSES[name].config}
    found = metrics(evaluate(loss_function(name, config), column(-1, -1, -1, -1), batch))
    assert "loss:sum" in found
    for key in found:
        assert key.split(":")[1:] in (["sum"], ["min"], ["max"], ["mean"])
