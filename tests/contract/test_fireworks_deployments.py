"""Deployments with the real SDK: created, loaded, changed, attached elsewhere, deleted."""

from __future__ import annotations

import pytest

from contract.fireworks import every_release, findings_of, shows, since

NAME = "accounts/local/deployments/serving"


@pytest.fixture(scope="module")
def findings(homefire_up):
    return findings_of(homefire_up, "fireworks_deployments.py")


@pytest.fixture
def found(findings, version):
    return findings(version)


@every_release
@shows("DeploymentManager.create_or_get")
def test_a_deployment_is_created_once(found):
    assert found["create_or_get"] == [NAME, NAME, NAME]
    assert found["force_recreate"] == {"served": "base", "follows": None}


@every_release
@shows("DeploymentManager.wait_for_ready")
@shows("DeploymentManager.warmup")
def test_a_deployment_becomes_ready_and_answers(found):
    assert found["wait_for_ready"] == "READY"
    assert found["warmup"] is True


@every_release
@shows("DeploymentManager.get")
def test_a_deployment_says_where_its_snapshots_lie(found):
    got = found["get"]
    assert got["state"] == "READY"
    assert "/store/local/" in got["bucket"]
    assert got["nowhere"] is None


@every_release
@shows("DeploymentManager.hotload_check_status")
def test_before_any_load_the_base_model_is_served(found):
    replica = found["hotload_check_status"]
    proven = replica.pop("homefire")
    assert replica == {
        "current_snapshot_identity": None,
        "readiness": True,
        "loading_state": {"stage": "idle"},
    }
    assert (proven["canary"], proven["attested_by"]) == ("absent", "memory")


@every_release
@shows("DeploymentManager.hotload")
@shows("DeploymentManager.wait_for_hotload")
def test_a_loaded_snapshot_is_named_by_completions(found):
    loaded = found["hotload"]
    assert loaded["done"] is True
    assert loaded["served"] == loaded["saved"]


@every_release
@shows("DeploymentManager.hotload_and_wait")
def test_a_delta_is_loaded_onto_the_snapshot_before(found):
    loaded = found["hotload_and_wait"]
    assert loaded["done"] is True
    assert loaded["served"] == loaded["saved"] != found["hotload"]["saved"]


@every_release
@shows("DeploymentManager.hotload of an unknown snapshot", refused="unknown_snapshot")
def test_an_unknown_snapshot_is_refused_and_the_old_weights_serve_on(found):
    assert found.refusal("hotload_of_nothing") == "unknown_snapshot"
    kept = found["what_is_served_after_a_failed_hotload"]
    assert kept == found["hotload_and_wait"]["served"]


@every_release
@shows("prompt-cache policies of a hot load")
def test_every_prompt_cache_policy_is_taken_and_any_other_word_refused(found):
    policies = found["prompt_cache_policies"]
    refused = {name for name, status in policies["statuses"].items() if status != 200}
    assert refused == {"some"}
    assert policies["statuses"]["some"] == 400
    assert policies["param"] == "reset_prompt_cache"


@every_release
@shows("WeightSyncer.save_and_hotload")
@shows("WeightSyncer.save_only")
@shows("WeightSyncer.hotload")
@shows("WeightSyncer.check_deployment_state")
@shows("WeightSyncer.wait_for_hotload_ready")
def test_every_sync_is_served_before_the_next_step(found):
    synced = found["weight_syncer"]
    assert synced["loaded"] is True
    for saved, state, served in synced["synced"]:
        assert saved == state == served
    assert len({saved for saved, _, _ in synced["synced"]}) == 3
    assert "hotload_time_s" in synced["timing"]


@every_release
@shows("WeightSyncer.save_and_hotload")
def test_the_first_sync_is_a_base_and_the_others_deltas_of_the_one_before(found):
    kinds = {name: (kind, parent) for name, kind, parent in found["snapshots"]}
    names = [saved for saved, _, _ in found["weight_syncer"]["synced"]]
    assert kinds[names[0]] == ("base", None)
    assert kinds[names[1]] == ("delta", names[0])
    assert kinds[names[2]] == ("delta", names[1])


@since("1.2.0a68")
@shows("WeightSyncer.reset_delta_chain")
def test_after_a_reset_the_next_sync_is_a_base(found):
    fresh = found["reset_delta_chain"]
    assert fresh["served"] == fresh["saved"]
    kinds = {name: kind for name, kind, _ in found["snapshots"]}
    assert kinds[fresh["saved"]] == "base"


@since("1.2.0a68")
@shows("WeightSyncer.get_deployment_sampler")
def test_a_syncer_gives_a_sampler_of_its_deployment(found):
    assert found["get_deployment_sampler"] == [NAME, [5, 7]]


@every_release
@shows("ledger of a deployment")
def test_the_ledger_names_every_load_until_it_is_emptied(found):
    ledger = found["ledger"]
    synced = [saved for saved, _, _ in found["weight_syncer"]["synced"]]
    assert [identity for identity in ledger["before"] if identity in synced] == synced
    assert ledger["emptied"] == []
    assert ledger["done"] is True
    assert ledger["after"] == [[ledger["saved"], True]]


@since("1.2.0a68")
@shows("DeploymentManager.update")
def test_an_update_changes_the_fields_of_its_mask_alone(found):
    assert found["update"]["name"] == NAME
    assert found["update"]["displayName"] == "shown"
    assert found["update"]["text"] != "out of the mask"


@since("1.2.0a68")
@shows("DeploymentManager.update of an unknown field", refused="invalid_argument")
def test_a_mask_of_something_unknown_is_refused(found):
    assert found.refusal("update_of_what_cannot_be") == "invalid_argument"


@since("1.2.20")
@shows("DeploymentManager.reattach_trainer")
def test_a_reattached_deployment_serves_on_and_loads_from_the_new_trainer(found):
    assert found["reattach_trainer"] == {
        "follows": True,
        "kept": True,
        "done": True,
        "served": True,
    }
    assert found.refusal("hotload_from_the_trainer_before") == "unknown_snapshot"


@every_release
@shows("DeploymentManager.scale_to_zero")
def test_scaling_to_zero_keeps_the_deployment_and_its_weights(found, version):
    scaled = found["scale_to_zero"]
    assert scaled["down"] == [0, 0]
    assert scaled["kept"] == ("" if version == "1.0.0a52" else "shown")
    assert scaled["up"] is True


@every_release
@shows("DeploymentManager.delete")
def test_a_deleted_deployment_is_gone_and_its_trainer_stays(found):
    assert found["delete"] == {"left": None, "job": "JOB_STATE_RUNNING"}
