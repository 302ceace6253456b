import random

import numpy as np
import pytest
import tinker

from homefire.quickstart.policy import Policy
from homefire.quickstart.task import Demonstration


class Done:
    def __init__(self, value):
        self.value = value

    def result(self):
        return self.value


class RecordingClient:
    """Remembers every call; every gradient reports a loss of 0.5."""

    def __init__(self):
        self.calls = []

    def forward_backward(self, data, loss_fn):
        self.calls.append((loss_fn, data))
        return self._output()

    def forward_backward_custom(self, data, loss_fn):
        self.calls.append((loss_fn.__name__, data))
        return self._output()

    def optim_step(self, params):
        self.calls.append(("optim_step", params))
        return Done(None)

    def _output(self):
        return Done(
            tinker.ForwardBackwardOutput(
                loss_fn_output_type="x", loss_fn_outputs=[], metrics={"loss:sum": 0.5}
            )
        )


class ByteTokenizer:
    eos_token_id = 256

    def apply_chat_template(self, conversation, **options):
        return [*conversation[0]["content"].encode(), 257]

    def encode(self, text, *, add_special_tokens):
        return list(text.encode())


@pytest.fixture
def policy():
    return Policy(RecordingClient(), ByteTokenizer())


def test_the_weights_of_a_supervised_batch_sum_to_one(policy):
    data = policy.supervised_data([Demonstration("21", "12"), Demonstration("543", "345")])

    weights = np.concatenate([d.loss_fn_inputs["weights"].to_numpy() for d in data])
    assert weights.sum() == pytest.approx(1.0)
    assert np.count_nonzero(weights) == 7
    assert data[0].model_input.to_ints() == [50, 49, 257, 49, 50]


def test_imitation_submits_gradient_and_step_before_it_waits(policy):
    data = policy.supervised_data([Demonstration("21", "12")])

    update = policy.imitate(data, learning_rate=0.25)

    (loss_fn, sent), (step, params) = policy.client.calls
    assert (loss_fn, sent) == ("cross_entropy", data)
    assert (step, params.learning_rate) == ("optim_step", 0.25)
    assert policy.num_steps == 1
    assert update.metrics() == {"loss:sum": 0.5}


def reinforce(policy, completions, rewards, num_updates=2):
    return policy.reinforce(
        completions, rewards, num_updates=num_updates, learning_rate=0.1, rng=random.Random(0)
    )


def test_a_batch_is_split_over_the_updates_without_loss(policy, completion):
    completions = [[completion() for _ in range(4)] for _ in range(2)]

    reinforce(policy, completions, [[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0]])

    gradients = [data for name, data in policy.client.calls if name != "optim_step"]
    assert [len(data) for data in gradients] == [4, 4]
    assert len(policy.client.calls) == 4
    assert policy.num_steps == 2


def test_groups_that_agree_teach_nothing_and_are_left_out(policy, completion):
    completions = [[completion() for _ in range(2)] for _ in range(2)]

    reinforce(policy, completions, [[1.0, 1.0], [0.0, 1.0]])

    sent = [data for name, data in policy.client.calls if name != "optim_step"]
    assert sum(len(data) for data in sent) == 2


def test_a_batch_in_which_all_groups_agree_makes_no_update(policy, completion):
    assert reinforce(policy, [[completion(), completion()]], [[1.0, 1.0]]) == []
    assert policy.client.calls == []
    assert policy.num_steps == 0
