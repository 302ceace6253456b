"""Gradients and weights of the real `tinker` client at the server's root.

Norms are of float32 sums in another order, so they agree to 1e-5; what must be the same operation
agrees bit for bit.
"""

from __future__ import annotations

import numpy as np
import pytest

from contract.cells import versions
from contract.references import base_model, checkpoint_tensors, difference, same_bits

ROWS = [list(b"homefire trains "), list(b"what you own"), list(b"5271 -> 1725")]
"""Of `scripts/tinker_kit.py`."""
SCRIPT = "tinker_training.py"
TOLERANCE = 1e-4
"""Of logprobs against a plain `transformers` forward."""
every_version = pytest.mark.parametrize("version", versions("tinker"))


def cell(method: str, **more: str) -> pytest.MarkDecorator:
    return pytest.mark.cell(client="tinker", method=method, **more)


@pytest.fixture
def found(run_tinker, version):
    return run_tinker(version, SCRIPT)


@pytest.fixture(scope="module")
def model(tinker_root):
    return base_model(tinker_root.home)


@every_version
@cell("get_server_capabilities")
def test_the_built_in_model_is_offered(found):
    assert "accounts/local/models/tiny" in found["capabilities"]


@every_version
@cell("forward_backward: cross_entropy")
def test_cross_entropy_is_the_weighted_sum_of_what_transformers_computes(found, model):
    """A fresh adapter changes nothing, so the model is the base model."""
    result = found["cross_entropy_is_a_weighted_sum"]
    expected = 0.0
    for row, logprobs, weights in zip(ROWS, result["logprobs"], result["weights"], strict=True):
        assert logprobs == pytest.approx(model.of_targets(row), abs=TOLERANCE)
        expected -= float(np.dot(logprobs, weights))
    assert result["loss"] == pytest.approx(expected, rel=1e-6)


@every_version
@cell("forward_backward: cross_entropy")
def test_a_gradient_is_a_sum_over_tokens_and_datums(found):
    norms = found["gradient_of_a_batch"]
    assert norms["once"] > 1.0
    assert norms["twice"] == pytest.approx(2 * norms["once"], rel=1e-5)
    assert norms["weighted"] == pytest.approx(3 * norms["once"], rel=1e-5)
    assert norms["unweighted"] == 0.0


@every_version
@cell("forward_backward: cross_entropy")
def test_absent_weights_are_ones(found):
    norms = found["without_weights_every_token_counts"]
    assert norms["absent"] == norms["ones"]


@every_version
@cell("forward_backward: targets [T, K]")
def test_several_targets_of_a_token_are_summed(found):
    result = found["several_targets_for_a_token"]
    assert result["shape"] == [len(ROWS[0]) - 1, 2]
    assert result["loss"] == pytest.approx(result["hard_loss"], rel=1e-6)
    assert result["soft"] == pytest.approx(result["hard"], rel=1e-5)


@every_version
@cell("forward")
def test_a_forward_leaves_no_gradient_behind(found):
    result = found["forward_leaves_no_gradient"]
    assert result["beside_a_forward"] == result["alone"]
    before, after = result["logprobs"]
    assert before == after


@every_version
@cell("forward_backward: accumulation")
def test_gradients_accumulate_until_the_step_and_no_longer(found):
    """Call by call, one of them with weights of zero."""
    norms = found["gradients_accumulate"]
    assert norms["parts"] == pytest.approx(norms["together"], rel=1e-5)
    assert norms["cleared"] == norms["together"]


@every_version
@cell("forward_backward_custom")
def test_a_custom_gradient_scales_with_its_loss_and_equals_the_built_in(found):
    result = found["custom_loss"]
    norms = result["norms"]
    assert norms["1"] == pytest.approx(result["builtin"], rel=1e-6)
    assert norms["10"] == pytest.approx(10 * norms["1"], rel=1e-6)
    assert norms["-1"] == norms["1"]
    assert result["builtin_less_custom"] < 1e-5 * norms["1"]
    assert result["metrics"]["mine"] == pytest.approx(-result["sum_of_logprobs"], rel=1e-6)


@every_version
@cell("forward_backward_custom")
def test_a_custom_loss_moves_the_weights_as_the_built_in_does(found, tinker_root):
    """Read in the store: a step with a large eps moves them along the gradient, to 1 in 1000."""
    updates = {
        name: difference(
            checkpoint_tensors(tinker_root.home, paths["after"]),
            checkpoint_tensors(tinker_root.home, paths["before"]),
        )
        for name, paths in found["custom_updates"].items()
    }
    builtin = updates["builtin"]
    size = np.abs(builtin).max()
    assert size > 1e-3
    assert np.array_equal(updates["1"], builtin)
    assert np.abs(updates["-1"] + builtin).max() < 1e-4 * size
    assert np.abs(updates["10"] / 10 - builtin).max() < 1e-3 * size


@pytest.mark.parametrize("version", versions("tinker", since="0.38.0"))
@cell("create_custom_loss: run by the client")
def test_a_traced_custom_loss_equals_the_built_in(found):
    result = found["traced_custom_loss"]
    assert result["left"] < 1e-5 * result["norm"]


@every_version
@cell("optim_step: grad_clip_norm")
def test_clipping_scales_the_whole_gradient_and_only_where_it_is_too_long(found, tinker_root):
    result = found["clipping"]
    update = {
        name: difference(
            checkpoint_tensors(tinker_root.home, paths["after"]),
            checkpoint_tensors(tinker_root.home, paths["before"]),
        )
        for name, paths in result.items()
    }
    free = np.linalg.norm(update["free"])
    assert np.linalg.norm(update["clipped"]) == pytest.approx(free / 4, rel=1e-3)
    assert np.array_equal(update["loose"], update["free"])
    direction = update["clipped"] @ update["free"] / np.linalg.norm(update["clipped"]) / free
    assert direction > 0.999999
    assert result["clipped"]["norm"] == result["free"]["norm"]


@every_version
@cell("optim_step")
def test_fields_that_a_client_leaves_out_have_its_defaults(found, tinker_root):
    paths = found["defaults_of_adam"]
    left_out, spelled = (
        checkpoint_tensors(tinker_root.home, paths[name]) for name in ("left_out", "spelled")
    )
    assert same_bits(left_out, spelled)


@every_version
@cell("optim_step")
def test_steps_lower_the_loss(found):
    result = found["learning"]
    # Nats of a token: about log 320 at first.
    assert result["losses"][0] / result["tokens"] == pytest.approx(np.log(320), rel=0.1)
    assert result["losses"][-1] < 0.6 * result["losses"][0]


@every_version
@cell("forward_backward: over 1024 datums")
def test_a_batch_of_several_requests_is_one_batch(found):
    """2050 datums: three requests; the rows come back in order, the gradient is their sum."""
    result = found["more_than_one_chunk"]
    by_pair: dict[tuple[int, ...], float] = {}
    for pair, logprob in zip(result["pairs"], result["logprobs"], strict=True):
        assert by_pair.setdefault(tuple(pair), logprob) == pytest.approx(logprob, abs=TOLERANCE)
    assert result["some_again"] == pytest.approx(result["logprobs"][1020:1030], abs=TOLERANCE)
    assert len({round(logprob, 3) for logprob in by_pair.values()}) > 200
    assert result["loss"] == pytest.approx(-sum(result["logprobs"]), rel=1e-5)
    assert result["whole"] == pytest.approx(result["halves"], rel=1e-5)


def assert_equals_formula(result: dict[str, float]) -> None:
    assert result["norm"] > 1.0
    assert result["left"] < 1e-5 * result["norm"]
    assert result["loss"] == pytest.approx(result["formula"], rel=1e-5)


@every_version
@cell("forward_backward: importance_sampling")
def test_importance_sampling_has_the_gradient_of_its_formula(found):
    assert_equals_formula(found["loss_importance_sampling"])


@every_version
@cell("forward_backward: ppo")
def test_ppo_has_the_gradient_of_its_formula(found):
    assert_equals_formula(found["loss_ppo"])


@every_version
@cell("forward_backward: cispo")
def test_cispo_has_the_gradient_of_its_formula(found):
    assert_equals_formula(found["loss_cispo"])


@every_version
@cell("forward_backward: dro")
def test_dro_has_the_gradient_of_its_formula(found):
    assert_equals_formula(found["loss_dro"])


@pytest.mark.parametrize("version", versions("tinker", since="0.38.0"))
@cell("forward_backward: gspo")
def test_gspo_has_the_gradient_of_its_formula(found):
    assert_equals_formula(found["loss_gspo"])
