"""`Fireworks()`, generated from the REST API: lists, states and deployments."""

from __future__ import annotations

import pytest

from contract.fireworks import HOSTED_MODEL, every_release, findings_of, shows, since

NAME = "accounts/local/deployments/one"


@pytest.fixture(scope="module")
def findings(homefire_up):
    return findings_of(homefire_up, "fireworks_generated.py")


@pytest.fixture
def found(findings, version):
    return findings(version)


@every_release
@shows("Fireworks().accounts.list")
def test_a_key_has_one_account(found):
    assert found["accounts_list"] == ["accounts/local"]


@every_release
@shows("Fireworks().reinforcement_fine_tuning_steps.create")
@shows("Fireworks().reinforcement_fine_tuning_steps.get")
def test_jobs_are_created_and_read(found):
    assert found["jobs_create"] == [3, HOSTED_MODEL]
    assert found["jobs_get"] == ["job 0", True]


@every_release
@shows("Fireworks().reinforcement_fine_tuning_steps.list")
def test_a_list_is_ordered_and_filtered_over_its_pages(found):
    assert found["jobs_list"] == {"names": ["job 2", "job 1", "job 0"], "one": ["job 1"]}
    refused = found.refusal("jobs_list_with_a_filter_that_is_not_understood")
    assert refused == "invalid_argument"


@since("1.2.30")
@shows("Fireworks().reinforcement_fine_tuning_steps.cancel")
def test_a_job_is_cancelled(found):
    assert found["jobs_cancel"] is None


@every_release
@shows("Fireworks().reinforcement_fine_tuning_steps.resume")
def test_a_cancelled_job_is_resumed(found):
    assert found["jobs_resume"] is None


@every_release
@shows("Fireworks().reinforcement_fine_tuning_steps.execute", refused="unsupported")
def test_a_step_of_managed_fine_tuning_is_refused(found):
    assert found.refusal("jobs_execute") == "unsupported"


@every_release
@shows("Fireworks().reinforcement_fine_tuning_steps.delete")
def test_deleted_jobs_are_listed_only_when_asked_for(found):
    assert found["jobs_delete"] == [0, 3]


@every_release
@shows("Fireworks().deployments.create")
@shows("Fireworks().deployments.list")
@shows("Fireworks().deployments.get")
def test_a_deployment_is_created_and_listed(found):
    assert found["deployments_create"] == [NAME, 2]
    assert found["deployments_list"] == [NAME]
    assert found.refusal("deployments_get_of_nothing") == "not_found"


@every_release
@shows("Fireworks().deployments.update")
def test_an_update_leaves_what_it_does_not_name(found):
    assert found["deployments_update"] == ["changed", 2]


@every_release
@shows("Fireworks().deployments.scale")
def test_replicas_are_scaled_up_and_to_none(found):
    assert found["deployments_scale"] == [0, 2]
    assert found.refusal("deployments_scale_beyond") == "invalid_argument"


@every_release
@shows("Fireworks().deployments.delete")
@shows("Fireworks().deployments.undelete")
def test_a_deleted_deployment_comes_back(found):
    assert found["deployments_undelete"] == {"listed": 0, "shown": ["DELETED"], "kept": "changed"}
    assert found["deployments_delete_hard"] is None


@every_release
@shows("Fireworks().models.list")
@shows("Fireworks().models.get")
def test_models_are_listed(found):
    assert found["models_list"] == [True, "READY"]


@every_release
@shows("Fireworks().datasets.list", refused="unsupported")
def test_data_stay_on_the_client(found):
    assert found.refusal("datasets_list") == "unsupported"
