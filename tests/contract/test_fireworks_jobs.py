"""Trainer jobs with the real SDK: created, waited for, stopped, resumed, deleted."""

from __future__ import annotations

import pytest

from contract.fireworks import every_release, findings_of, shows, since


@pytest.fixture(scope="module")
def findings(homefire_up):
    return findings_of(homefire_up, "fireworks_jobs.py")


@pytest.fixture
def found(findings, version):
    return findings(version)


@every_release
@shows("TrainerJobManager.resolve_training_profile")
def test_a_hosted_shape_resolves_to_what_this_machine_trains(found, version):
    profile = found["resolve_training_profile"]
    shape = "accounts/fireworks/trainingShapes/qwen3-8b-128k-h200"
    assert profile["shape"] == shape
    assert profile["version"].startswith(f"{shape}/versions/")
    assert profile["context"] == 2048
    assert profile["mode"] in ("POLICY_TRAINER", None if version == "1.0.0a52" else "")
    assert "HTTP 404" in found.error("unknown_shape")["message"]


@every_release
@shows("TrainerJobManager.create")
def test_a_job_is_created_at_once_and_waited_for_separately(found):
    created = found["create"]
    assert created["name"] == f"accounts/local/rlorTrainerJobs/{created['id']}"


@every_release
@shows("TrainerJobManager.wait_for_ready")
def test_a_job_that_is_ready_trains(found):
    ready = found["wait_for_ready"]
    assert ready["job"] == found["create"]["id"]
    assert ready["after"] > ready["before"] + 1e-3


@every_release
@shows("TrainerJobManager.get")
def test_a_job_says_what_it_is(found):
    assert found["get"] == {
        "name": found["create"]["name"],
        "displayName": "first",
        "state": "JOB_STATE_RUNNING",
        "trainerMode": "POLICY_TRAINER",
    }


@every_release
@shows("TrainerJobManager.wait_for_existing")
def test_a_client_of_an_existing_job_finds_the_live_weights(found):
    assert found["wait_for_existing"]["same"] == 0.0


@every_release
@shows("TrainerJobManager.reconnect_and_wait")
def test_a_cancelled_job_is_reconnected_to_with_its_weights(found):
    assert found["reconnect_and_wait"]["same"] == 0.0
    missing = found.error("reconnect_to_nothing")
    assert "not found" in missing["message"].lower()


@every_release
@shows("TrainerJobManager.resume_and_wait")
def test_a_resumed_job_goes_on_where_it_stopped(found):
    resumed = found["resume_and_wait"]
    assert resumed["same"] == 0.0
    assert resumed["goes_on"] > 1e-3


@since("1.2.20")
@shows("TrainerJobManager.try_get")
def test_a_job_that_is_not_there_is_none(found):
    assert found["try_get"] == {"there": "JOB_STATE_RUNNING", "nowhere": None}


@since("1.2.20")
@shows("TrainerJobManager.create")
def test_a_create_that_is_repeated_gives_the_same_job(found):
    assert found["create_again_under_the_same_id"] == found["create"]["id"]


@every_release
@shows("TrainerJobManager.create of an unknown base model", refused="unknown_model")
def test_an_unknown_base_model_is_refused_with_a_reason(found, version):
    assert found.refusal("unknown_base_model") == "unknown_model"
    raised = "HTTPStatusError" if version in ("1.0.0a52", "1.2.0a68") else "TrainingAPIError"
    assert found.error("unknown_base_model")["type"] == raised


@every_release
@shows("TrainerJobManager.delete")
def test_a_deleted_job_leaves_a_tombstone_with_its_checkpoints(found):
    assert found["delete"] == {"state": "JOB_STATE_DELETED", "checkpoints": ["kept"]}


@every_release
@shows("TrainerJobManager.create_and_wait")
def test_a_lora_job_is_created_and_waited_for_in_one_call(found):
    made = found["create_and_wait"]
    assert made["mode"] == "LORA_TRAINER"
    assert made["after"] > made["before"] + 1e-3
