import random

import pytest

from homefire.quickstart.policy import Policy
from homefire.quickstart.promises import PromiseBroken
from homefire.quickstart.rollouts import Rollout, RolloutSampler, rewards_of
from homefire.sdk import WeightsIdentity


class ScriptedSampler:
    """Answers every request with the same completion, and remembers what it was asked."""

    def __init__(self, completion):
        self.completion = completion
        self.asked = []

    async def sample_with_tokens(self, messages, n, **options):
        self.asked.append((messages[0]["content"], n, options))
        return [self.completion] * n


@pytest.fixture
def rollouts(completion):
    def make(**fields):
        sampler = ScriptedSampler(completion(**fields))
        return RolloutSampler(sampler, Policy(None, None, "sort: "), max_answer_tokens=8)

    return make


def test_each_prompt_gets_a_group_of_scored_completions(rollouts, snapshot):
    (right, wrong) = rollouts().groups(["21", "543"], group_size=3, snapshot=snapshot())

    assert [each.reward for each in right] == [1.0, 1.0, 1.0]
    assert [each.reward for each in wrong] == [0.0, 0.0, 0.0]


def test_a_right_answer_that_was_cut_off_earns_nothing(rollouts, snapshot):
    sampler = rollouts(finish_reason="length")

    ((rollout,),) = sampler.groups(["21"], group_size=1, snapshot=snapshot())

    assert rollout.reward == 0.0


def test_requests_expect_the_identity_that_was_hot_loaded_and_ask_for_logprobs(rollouts, snapshot):
    sampler = rollouts()

    sampler.groups(["21"], group_size=2, snapshot=snapshot())

    ((content, n, options),) = sampler.sampler.asked
    assert (content, n) == ("sort: 21", 2)
    assert options["expect_identity"] == "step_00312-4b50536f"
    assert options["logprobs"] is True


def test_held_out_answers_are_sampled_with_a_seed_of_their_own(rollouts, snapshot):
    sampler = rollouts()

    answers = sampler.answers(["21", "543"], snapshot=snapshot())

    assert [answer.prompt for answer in answers] == ["21", "543"]
    assert [options["seed"] for _, _, options in sampler.sampler.asked] == [0, 1]


@pytest.mark.parametrize(
    "weights", [None, WeightsIdentity("step_00312-4b50536f", "00"), WeightsIdentity("base", "")]
)
def test_a_completion_of_other_weights_ends_the_run(rollouts, snapshot, weights):
    with pytest.raises(PromiseBroken, match="step_00312-4b50536f"):
        rollouts(weights=weights).groups(["21"], group_size=1, snapshot=snapshot())


def test_shuffled_rewards_are_the_same_rewards_elsewhere(completion):
    groups = [
        [Rollout("21", completion(), float(i)) for i in range(8 * g, 8 * g + 8)] for g in (0, 1)
    ]

    plain = rewards_of(groups)
    shuffled = rewards_of(groups, shuffled_by=random.Random(0))

    assert plain == [[float(i) for i in range(8)], [float(i) for i in range(8, 16)]]
    assert shuffled != plain
    assert sorted(shuffled[0] + shuffled[1]) == sorted(plain[0] + plain[1])
