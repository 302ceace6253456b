"""A service that provisions what it needs, and ends it: `from_firetitan_config`."""

from __future__ import annotations

import pytest

from contract.fireworks import findings_of, shows, since

since_it_exists = since("1.2.20")


@pytest.fixture(scope="module")
def findings(homefire_up):
    return findings_of(homefire_up, "fireworks_managed.py")


@pytest.fixture
def found(findings, version):
    return findings(version)


@since_it_exists
@shows("FiretitanServiceClient.from_firetitan_config")
def test_a_trainer_and_a_deployment_that_follows_it_are_provisioned(found):
    made = found["from_firetitan_config"]
    assert made["after"] > made["before"] + 1e-3
    shape = "accounts/fireworks/trainingShapes/qwen3-8b-128k-h200"
    assert made["shown"] == ["managed", "1800s", shape]
    assert made["context"] == 2048
    assert made["follows"].startswith("accounts/local/rlorTrainerJobs/")


@since_it_exists
@shows("managed: create_reference_client")
def test_the_reference_stays_while_the_policy_trains(found):
    reference = found["create_reference_client"]
    assert reference["still"] is True
    assert reference["apart"] is True
    assert reference["mode"] == "FORWARD_ONLY"
    assert reference["base"] == found["from_firetitan_config"]["before"]


@since_it_exists
@shows("managed: create_sampling_client")
def test_a_sampling_client_samples_the_snapshot_that_it_was_made_of(found):
    assert found["create_sampling_client"] == {"served": True, "lengths": [True, True]}


@since_it_exists
@shows("managed: create_deployment_sampler")
def test_the_second_sync_is_a_delta_whose_samples_the_trainer_scores_alike(found):
    sampled = found["create_deployment_sampler"]
    assert sampled["kinds"] == ["base", "delta"]
    assert len(sampled["sampled"]) == 4
    assert sampled["sampled"] == pytest.approx(sampled["trained"], abs=1e-5)


@since_it_exists
@shows("managed: list_checkpoints and promote_checkpoint")
def test_a_managed_service_lists_and_promotes(found):
    assert found["list_and_promote_checkpoints"] == {"count": 2, "state": "READY"}


@since_it_exists
@shows("managed: close with cleanup")
def test_closing_deletes_what_it_made(found):
    assert found["close"] == ["JOB_STATE_DELETED", "JOB_STATE_DELETED"]


@since_it_exists
@shows("managed: reattach a deployment")
def test_an_existing_deployment_is_attached_and_not_deleted(found):
    assert found["reattach"] == {"served": True, "left": "READY", "follows": True}


@since_it_exists
@shows("managed: close scaling to zero")
def test_closing_may_scale_to_zero(found):
    assert found["cleanup_by_scaling_to_zero"] == "READY"


@since_it_exists
@shows("managed: an adapter and its base as reference")
def test_the_reference_of_an_adapter_is_its_base_on_the_same_trainer(found):
    adapter = found["managed_adapter"]
    assert adapter["reference"] == found["from_firetitan_config"]["before"]
    assert adapter["policy"] > adapter["reference"] + 1e-3
    assert adapter["own_job"] is None
    assert adapter["served"] is True
    assert found["close_of_the_adapter"] == "JOB_STATE_DELETED"


@since_it_exists
@shows("managed: max_lora_rank with several models", refused="invalid_argument")
def test_a_second_adapter_of_another_rank_is_refused_and_the_first_trains_on(found):
    assert found.refusal("several_adapters") == "invalid_argument"
    assert found["the_first_adapter_trains_on"] > 1e-3
