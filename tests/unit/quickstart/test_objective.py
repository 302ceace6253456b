import math

import pytest
import torch

from homefire.quickstart.datums import rollout_datum
from homefire.quickstart.objective import clipped_policy_gradient, group_advantages


@pytest.fixture
def batch(completion):
    """Data of one right and one wrong completion, and their logprobs moved by `change`."""

    def make(change):
        data = [rollout_datum(completion(), 0.5), rollout_datum(completion(), -0.5)]
        logprobs = [d.loss_fn_inputs["logprobs"].to_torch() + change for d in data]
        return data, [each.requires_grad_() for each in logprobs]

    return make


def test_advantages_are_relative_to_the_group():
    assert group_advantages([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0]]) == [
        [0.5, -0.5, -0.5, 0.5],
        [0.0, 0.0],
    ]


def test_under_the_sampling_weights_the_gradient_is_the_policy_gradient(batch):
    data, logprobs = batch(0.0)

    loss, metrics = clipped_policy_gradient(data, logprobs)
    loss.backward()

    right, wrong = [each.grad.tolist() for each in logprobs]
    assert right == pytest.approx([0, 0, -0.5 / 6, -0.5 / 6, -0.5 / 6])
    assert wrong == pytest.approx([0, 0, 0.5 / 6, 0.5 / 6, 0.5 / 6])
    assert metrics["largest_logprob_change"] == pytest.approx(0.0)


def test_a_ratio_beyond_the_bounds_teaches_only_the_way_back(batch):
    data, logprobs = batch(math.log(2.0))

    loss, _ = clipped_policy_gradient(data, logprobs)
    loss.backward()

    right, wrong = [each.grad.abs().sum().item() for each in logprobs]
    assert right == 0.0
    assert wrong == pytest.approx(3 * 2.0 * 0.5 / 6)


def test_the_loss_agrees_with_a_reference_written_out_token_by_token(batch):
    data, logprobs = batch(0.4)

    loss, _ = clipped_policy_gradient(data, logprobs)

    ratio = math.exp(0.4)
    right = min(ratio * 0.5, 1.3 * 0.5)
    wrong = min(ratio * -0.5, 1.3 * -0.5)
    assert loss.item() == pytest.approx(-(3 * right + 3 * wrong) / 6)


def test_the_prompt_has_no_part_in_the_gradient_even_when_its_logprobs_are_extreme(batch):
    data, logprobs = batch(0.0)
    with torch.no_grad():
        logprobs[0][0] = -30.0

    loss, _ = clipped_policy_gradient(data, logprobs)
    loss.backward()

    assert logprobs[0].grad[:2].tolist() == [0.0, 0.0]
