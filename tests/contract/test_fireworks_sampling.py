"""The SDK's samplers: tokens, and logprobs that are the trainer's."""

from __future__ import annotations

import pytest

from contract.fireworks import every_release, findings_of, shows, since
from homefire.checkpoints.tiny import ensure_tiny


@pytest.fixture(scope="module")
def findings(homefire_up, tmp_path_factory):
    tokenizer = ensure_tiny(tmp_path_factory.mktemp("tokenizer") / "tiny")
    return findings_of(homefire_up, "fireworks_sampling.py", tokenizer)


@pytest.fixture
def found(findings, version):
    read = findings(version)
    assert read["set_up"] is True
    return read


@every_release
@shows("DeploymentSampler.sample_with_tokens")
def test_a_chat_is_rendered_by_the_client_and_sampled_n_times(found):
    assert found["sample_with_tokens"] == {"prompts": [True] * 3, "lengths": [True] * 3}


@since("1.2.0a68")
@shows("DeploymentSampler.sample_with_prompt_tokens")
def test_token_ids_come_back_in_front_of_the_completion(found):
    assert found["sample_with_prompt_tokens"] == [[[5, 7], True], [[5, 7], True]]


@every_release
@shows("DeploymentSampler: seed")
def test_a_seed_draws_the_same_again_and_samples_without_one_differ(found):
    assert found["seed"] == {"same": True, "differs": True, "reason": "length", "count": 24}
    assert found["several_samples"] == 4


@every_release
@shows("DeploymentSampler: logprobs")
def test_the_samplers_logprobs_are_the_trainers(found):
    logprobs = found["logprobs"]
    assert logprobs["sampled"] == pytest.approx(logprobs["trained"], abs=1e-5)
    assert len(logprobs["sampled"]) == 6


@since("1.2.20")
@shows("DeploymentSampler: sampling_logprobs")
def test_a_temperature_changes_the_sampling_logprobs_and_not_the_raw_ones(found):
    logprobs = found["sampling_logprobs"]
    assert len(logprobs["raw"]) == len(logprobs["sampled"]) == 6
    assert all(abs(a - b) > 1e-6 for a, b in zip(logprobs["raw"], logprobs["sampled"], strict=True))


@every_release
@shows("DeploymentSampler: echo")
def test_an_echoed_prompt_is_scored_like_the_trainer_does(found):
    echo = found["echo"]
    assert echo["echoed"] is True
    assert echo["prompt"] is True
    assert echo["scored"] == pytest.approx(echo["trained"], abs=1e-5)


@every_release
@shows("DeploymentSampler: top_logprobs")
def test_the_likeliest_tokens_come_in_order_and_greedy_takes_the_first(found):
    entries = found["top_logprobs"]
    assert len(entries) == 3
    for entry in entries:
        values = [logprob for _, logprob in entry["top"]]
        assert len(values) == 4
        assert values == sorted(values, reverse=True)
        assert entry["top"][0] == [entry["token"], entry["logprob"]]


@every_release
@shows("DeploymentSampler: stop")
def test_a_stop_text_ends_the_completion_before_itself(found):
    stopped = found["stop"]
    assert stopped["reason"] == "stop"
    assert stopped["text"] == stopped["before"]


@every_release
@shows("DeploymentSampler: max_seq_len")
def test_a_longest_sequence_is_kept_to(found):
    assert found["max_seq_len"] == {"too_long": [], "grown": [], "fits": 1}


@every_release
@shows("AdaptiveConcurrencyController")
def test_the_servers_queue_times_move_the_window(found):
    controller = found["concurrency_controller"]
    assert controller["after"] > controller["window"]
    assert 0.0 <= controller["queue"] < 0.5


@since("1.2.0a68")
@shows("DeploymentSampler of a token that is not there", refused="token_out_of_range")
def test_a_token_outside_the_vocabulary_is_refused(found):
    assert found.refusal("token_out_of_range") == "token_out_of_range"


@since("1.2.20")
@shows("FiretitanSamplingClient.sample")
def test_tinkers_interface_over_a_deployment_samples(found):
    first, second = found["sampling_client"]
    assert first["tokens"] != second["tokens"]
    for sequence in (first, second):
        assert len(sequence["tokens"]) == sequence["logprobs"] <= 5
        assert sequence["reason"] in ("stop", "length")
