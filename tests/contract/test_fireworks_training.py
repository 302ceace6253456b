"""The SDK's training client: gradients, steps, states and references, by their numbers."""

from __future__ import annotations

import pytest

from contract.fireworks import HOSTED_MODEL, every_core_release, findings_of, shows, since


@pytest.fixture(scope="module")
def findings(homefire_up):
    return findings_of(homefire_up, "fireworks_training.py")


@pytest.fixture
def found(findings, version):
    return findings(version)


@every_core_release
@shows("FiretitanServiceClient.create_training_client")
@shows("FiretitanServiceClient.get_server_capabilities")
@shows("FiretitanTrainingClient.get_info")
def test_a_training_client_knows_what_it_trains(found):
    assert found["get_server_capabilities"][0] == HOSTED_MODEL
    assert found["get_info"] == [HOSTED_MODEL, 0, False]


@every_core_release
@shows("FiretitanTrainingClient.forward")
def test_a_forward_pass_gives_every_targets_logprob_and_no_gradient(found):
    assert found["forward"] == {"rows": [15, 11], "again": True, "gradient": 0.0}


@every_core_release
@shows("FiretitanTrainingClient.forward_backward")
def test_the_loss_is_a_weighted_sum_and_gradients_add_up_until_the_step(found):
    pass_ = found["forward_backward"]
    assert pass_["loss"] == pytest.approx(pass_["by_hand"], rel=1e-6)
    assert pass_["twice"] == pytest.approx(2 * pass_["once"], rel=1e-6)
    assert pass_["once"] > 0.1
    assert pass_["cleared"] == 0.0


@every_core_release
@shows("FiretitanTrainingClient.forward_backward_custom")
def test_the_gradient_of_a_custom_loss_scales_with_it_and_equals_the_built_in_one(found):
    custom = found["forward_backward_custom"]
    once = custom["norms"]["1.0"]
    assert once == pytest.approx(custom["built_in"], rel=1e-5)
    assert custom["norms"]["10.0"] == pytest.approx(10 * once, rel=1e-5)
    assert custom["norms"]["-1.0"] == pytest.approx(once, rel=1e-5)
    assert custom["mine"] == [-1.0]


@every_core_release
@shows("FiretitanTrainingClient.optim_step")
def test_a_step_moves_the_weights_towards_the_data(found):
    stepped = found["optim_step"]
    assert stepped["after"] > stepped["before"] + 1e-3
    assert stepped["norm"] > 0.1


@every_core_release
@shows("AdamParams.grad_clip_norm")
def test_a_clipped_step_goes_less_far(found):
    unclipped, clipped = found["grad_clip_norm"]
    assert unclipped > clipped + 1e-5


@every_core_release
@shows("optim_step(grad_accumulation_normalization)")
def test_the_gradient_is_divided_by_what_was_asked_for(found):
    norms, tokens = (found["grad_accumulation_normalization"][k] for k in ("norms", "tokens"))
    assert norms["None"] == norms["none"]
    assert norms["num_loss_tokens"] == pytest.approx(norms["none"] / tokens, rel=1e-5)
    assert norms["num_sequences"] == pytest.approx(norms["none"] / 2, rel=1e-5)


@every_core_release
@shows("FiretitanTrainingClient.save_state")
@shows("FiretitanTrainingClient.list_checkpoints")
def test_a_saved_state_is_listed_under_its_name(found):
    assert found["save_state"] == {"path": "kept", "names": ["kept", "unclipped"]}


@every_core_release
@shows("FiretitanTrainingClient.load_state_with_optimizer")
def test_a_loaded_state_goes_on_bit_for_bit(found):
    assert found["load_state_with_optimizer"] == {"back": 0.0, "again": 0.0}
    assert found.refusal("load_state_of_nothing") == "unknown_snapshot"


@every_core_release
@shows("FiretitanTrainingClient.load_state")
def test_a_state_without_its_optimizer_steps_elsewhere(found):
    loaded = found["load_state"]
    assert loaded["back"] == 0.0
    assert abs(loaded["again"]) > 1e-4


@every_core_release
@shows("FiretitanTrainingClient.resolve_checkpoint_path")
def test_a_state_of_a_deleted_job_is_loaded_into_another(found):
    resolved = found["resolve_checkpoint_path"]
    assert resolved["path"] == f"cross_job://{resolved['job']}/across"
    assert resolved["loaded"] == 0.0


@every_core_release
@shows("FiretitanServiceClient.create_training_client(lora_rank)")
def test_an_adapter_begins_at_the_base_and_trains(found):
    lora = found["create_training_client_lora"]
    assert lora["rank"] == 4
    assert lora["before"] == found["create_training_client"]
    assert lora["after"] > lora["before"] + 1e-3


@every_core_release
@shows("FiretitanTrainingClient.save_weights_for_sampler_ext")
def test_a_snapshot_has_the_name_that_was_sent(found):
    saved = found["save_weights_for_sampler_ext"]
    assert saved["path"] == saved["snapshot"]
    assert saved["snapshot"].startswith("adapter-")


@since("1.2.0a68")
@shows("FiretitanServiceClient.create_base_training_client")
def test_the_base_stays_what_it_was_while_its_adapter_trains(found):
    base = found["create_base_training_client"]
    assert base["base"] == base["still"] == found["create_training_client"]
    assert base["policy"] > found["create_training_client_lora"]["after"]


@since("1.2.0a68")
@shows("forward_backward on a base-only client", refused="failed_precondition")
def test_the_base_takes_no_gradient(found):
    assert found.refusal("forward_backward_on_the_base") == "failed_precondition"


@every_core_release
@shows("TrainerJobConfig.forward_only")
def test_a_reference_job_runs_forward(found):
    reference = found["forward_only"]
    assert reference["mode"] == "FORWARD_ONLY"
    assert reference["logprob"] == found["create_training_client"]


@every_core_release
@shows("forward_backward on a forward-only job", refused="failed_precondition")
def test_a_reference_job_takes_no_gradient(found):
    assert found.refusal("forward_backward_on_a_reference") == "failed_precondition"
