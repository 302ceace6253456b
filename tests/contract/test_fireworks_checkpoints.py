"""Checkpoints of a job, and the models that promotion makes of them, with the real SDK."""

from __future__ import annotations

import pytest

from contract.fireworks import HOSTED_MODEL, every_release, findings_of, shows, since


@pytest.fixture(scope="module")
def findings(homefire_up):
    return findings_of(homefire_up, "fireworks_checkpoints.py")


@pytest.fixture
def found(findings, version):
    return findings(version)


@since("1.2.0a68")
@shows("FireworksClient.list_checkpoints")
def test_checkpoints_are_listed_oldest_first_over_pages(found):
    base, delta, state = found["list_checkpoints"]["saved"]
    assert found["list_checkpoints"]["rows"] == [
        [base, "CHECKPOINT_TYPE_INFERENCE_BASE", True],
        [delta, "CHECKPOINT_TYPE_INFERENCE_ARC_V2", True],
        [state, "CHECKPOINT_TYPE_TRAINING", False],
    ]


@every_release
@shows("FireworksClient.promote_checkpoint")
def test_a_base_becomes_a_model(found):
    assert found["promote_checkpoint"] == {
        "name": "accounts/local/models/of-a-base",
        "state": "READY",
        "kind": "HF_BASE_MODEL",
        "checkpoint": found["set_up"][0],
    }
    assert found["promote_again"] == "accounts/local/models/of-a-delta"
    assert found["promote_from_a_deleted_job"] == "READY"


@every_release
@shows("FireworksClient.promote_checkpoint of a delta")
def test_a_trainer_on_a_promoted_delta_begins_where_the_other_stood(found):
    assert found["promote_a_delta"] == {"kind": "HF_BASE_MODEL", "same": 0.0}


@every_release
@shows("FireworksClient.promote_checkpoint of an adapter")
def test_an_adapter_becomes_an_addon(found):
    promoted = found["promote_an_adapter"]
    assert promoted["kind"] == "HF_PEFT_ADDON"
    assert promoted["peft"]["baseModel"] == HOSTED_MODEL
    assert promoted["peft"]["r"] == 4
    assert promoted["peft"]["targetModules"]


@since("1.2.0a68")
@shows("FireworksClient.promote_checkpoint (positional)")
def test_the_older_form_of_a_promotion_works(found):
    assert found["promote_positional"] == "accounts/local/models/positional"


@every_release
@shows("FireworksClient.promote_checkpoint of what cannot be", refused="wrong_checkpoint_kind")
def test_a_promotion_that_cannot_be_says_why(found, version):
    assert "is a train state" in found.error("promote_a_state")["message"]
    assert "is not in the store" in found.error("promote_nothing")["message"]
    assert "exists" in found.error("promote_another_under_a_taken_name")["message"]
    if version != "1.0.0a52":
        assert "which the job trained" in found.error("promote_with_another_base_model")["message"]


@every_release
@shows("a deployment of a promoted model")
def test_a_promoted_model_is_served(found):
    assert found["deploy_a_promoted_model"] == ["READY", True]


@since("1.2.20")
@shows("FireworksClient.model_is_moe")
def test_a_dense_model_is_not_a_mixture_of_experts(found):
    assert found["model_is_moe"] is False
