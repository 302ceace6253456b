import pytest

from homefire.quickstart.datums import rollout_datum, supervised_datum


def values(datum, name):
    return datum.loss_fn_inputs[name].to_numpy().tolist()


def test_a_supervised_row_predicts_each_next_token_and_weighs_the_answer_alone():
    datum = supervised_datum([50, 49, 257], [49, 50, 256], weight=0.25)

    assert datum.model_input.to_ints() == [50, 49, 257, 49, 50]
    assert values(datum, "target_tokens") == [49, 257, 49, 50, 256]
    assert values(datum, "weights") == [0.0, 0.0, 0.25, 0.25, 0.25]


def test_a_rollout_row_carries_advantage_and_sampled_logprob_of_each_completion_token(completion):
    datum = rollout_datum(completion(), 0.5)

    assert datum.model_input.to_ints() == [50, 49, 257, 49, 50]
    assert values(datum, "target_tokens") == [49, 257, 49, 50, 256]
    assert values(datum, "advantages") == [0.0, 0.0, 0.5, 0.5, 0.5]
    assert values(datum, "logprobs") == [0.0, 0.0, -0.5, -0.25, -0.125]


def test_a_completion_without_logprobs_is_refused(completion):
    with pytest.raises(ValueError, match="logprobs=True"):
        rollout_datum(completion(inference_logprobs=None), 0.5)
