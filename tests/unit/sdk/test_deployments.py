from __future__ import annotations

import httpx
import pytest

from homefire.sdk import DeploymentConfig, DeploymentManager
from homefire.sdk.hot_load import HotLoadVerdict, judge

_ONE = "/v1/accounts/local/deployments/research-serving"
_GET, _PATCH, _DELETE = f"GET {_ONE}", f"PATCH {_ONE}", f"DELETE {_ONE}"
_CREATE = "POST /v1/accounts/local/deployments"
_PROBE = "POST /inference/v1/completions"
_LOAD = "POST /hot_load/v1/models/hot_load"
_STATUS = "GET /hot_load/v1/models/hot_load"
_MODEL = "accounts/fireworks/models/qwen3-8b"
_JOB = "accounts/local/rlorTrainerJobs/job-abc123"


def deployment(state: str = "READY", **fields) -> dict:
    return {"name": "accounts/local/deployments/research-serving", "state": state, **fields}


def replica(identity: str | None, *, stage: str = "idle", target: str | None = None, ready=True):
    loading = {"stage": stage, **({"target_snapshot_identity": target} if target else {})}
    return {
        "current_snapshot_identity": identity,
        "readiness": ready,
        "loading_state": loading,
    }


@pytest.fixture
def manager(control, manual_time) -> DeploymentManager:
    return DeploymentManager(
        "fw_test", "http://server", waiter=manual_time.waiter, transport=control.transport
    )


@pytest.fixture
def config() -> DeploymentConfig:
    return DeploymentConfig(
        deployment_id="research-serving",
        base_model=_MODEL,
        hot_load_trainer_job=_JOB,
        min_replica_count=0,
        max_replica_count=1,
    )


def test_a_missing_deployment_is_created_with_the_fireworks_sdk_s_body(control, manager, config):
    control.on(_CREATE, deployment("CREATING", hotLoadBucketUrl="gs://x/y"))
    info = manager.create_or_get(config)
    assert control.lines == ["GET /v1/accounts", _GET, _CREATE]
    assert control.seen[-1].query == {"deploymentId": "research-serving"}
    assert control.seen[-1].body == {
        "baseModel": _MODEL,
        "minReplicaCount": 0,
        "maxReplicaCount": 1,
        "enableHotLoad": True,
        "hotLoadBucketType": "FW_HOSTED",
        "hotLoadTrainerJob": _JOB,
        "acceleratorType": "NVIDIA_H200_141GB",
    }
    assert (info.state, info.hot_load_bucket_url) == ("CREATING", "gs://x/y")
    assert info.inference_model == "accounts/local/deployments/research-serving"


def test_a_shape_takes_the_place_of_the_accelerator(control, manager, config):
    control.on(_CREATE, deployment("CREATING"))
    config.deployment_shape = "accounts/fireworks/deploymentShapes/ds/versions/v1"
    config.region = "US_OHIO_1"
    config.skip_shape_validation = True
    manager.create_or_get(config)
    seen = control.seen[-1]
    assert seen.query == {"deploymentId": "research-serving", "skipShapeValidation": "true"}
    assert seen.body["placement"] == {"region": "US_OHIO_1"}
    assert "acceleratorType" not in seen.body


def test_an_existing_deployment_is_returned_as_it_is(control, manager, config, caplog):
    control.on(_GET, deployment("READY", hotLoadTrainerJob="accounts/local/rlorTrainerJobs/other"))
    assert manager.create_or_get(config).state == "READY"
    assert control.calls(_CREATE) == []
    assert "re-attaches" in caplog.text


@pytest.mark.parametrize("state", ["FAILED", "DELETING", "DELETED"])
def test_a_broken_deployment_is_removed_and_made_again(control, manager, config, state):
    control.on(_GET, deployment(state), deployment("DELETING"), (404, {}))
    control.on(_DELETE, {})
    control.on(_CREATE, deployment("CREATING"))
    assert manager.create_or_get(config).state == "CREATING"
    assert control.calls(_DELETE)[0].query == {"ignoreChecks": "true", "hard": "true"}


def test_force_recreate_removes_a_good_deployment_too(control, manager, config):
    control.on(_GET, deployment("READY"), (404, {}))
    control.on(_DELETE, {})
    control.on(_CREATE, deployment("CREATING"))
    assert manager.create_or_get(config, force_recreate=True).state == "CREATING"


def test_a_deployment_that_another_client_just_made_is_taken(control, manager, config):
    control.on(_GET, (404, {}), deployment("CREATING"))
    control.on(_CREATE, (409, {"message": "exists"}))
    assert manager.create_or_get(config).state == "CREATING"


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"deployment_id": ""}, "deployment_id"),
        ({"base_model": ""}, "base_model"),
        ({"min_replica_count": 2}, "min_replica_count"),
        ({"min_replica_count": -1}, "min_replica_count"),
    ],
)
def test_a_bad_config_is_refused_by_field_before_any_request(
    control, manager, config, fields, named
):
    for name, value in fields.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=named):
        manager.create_or_get(config)
    assert control.seen == []


def test_a_deployment_that_answers_a_probe_is_ready(control, manager):
    control.on(_GET, deployment("CREATING"))
    control.on(_PROBE, httpx.ReadTimeout("slow"), (503, {}), {"choices": []})
    manager.wait_for_ready("research-serving")
    probe = control.calls(_PROBE)[-1]
    assert probe.body == {
        "model": "accounts/local/deployments/research-serving",
        "prompt": [1, 2],
        "max_tokens": 4,
        "temperature": 0.0,
    }
    assert probe.headers["authorization"] == "Bearer fw_test"


def test_a_ready_deployment_needs_no_probe_and_an_updating_one_just_waits(control, manager):
    control.on(_GET, deployment("UPDATING"), deployment("READY"))
    assert manager.wait_for_ready("research-serving").state == "READY"
    assert control.calls(_PROBE) == []


def test_a_failed_deployment_says_why(control, manager):
    control.on(_GET, deployment("FAILED", status={"message": "no memory"}))
    with pytest.raises(RuntimeError, match="FAILED: no memory"):
        manager.wait_for_ready("research-serving")


def test_a_missing_deployment_is_not_waited_for(manager):
    with pytest.raises(RuntimeError, match="does not exist"):
        manager.wait_for_ready("research-serving")


def test_update_sends_the_mask_and_the_fields(control, manager):
    control.on(_PATCH, deployment())
    manager.update("research-serving", {"hotLoadTrainerJob": _JOB}, "hot_load_trainer_job")
    manager.update("research-serving", {}, ["min_replica_count", "max_replica_count"])
    first, second = control.calls(_PATCH)
    assert first.query == {"updateMask": "hot_load_trainer_job"}
    assert first.body == {"hotLoadTrainerJob": _JOB}
    assert second.query == {"updateMask": "min_replica_count,max_replica_count"}
    with pytest.raises(ValueError, match="update_mask"):
        manager.update("research-serving", {}, [])


def test_scale_to_zero_sends_no_mask_and_only_logs_a_failure(control, manager, caplog):
    control.on(_PATCH, deployment(), (400, {"message": "no"}))
    manager.scale_to_zero("research-serving")
    (seen,) = control.calls(_PATCH)
    assert (seen.query, seen.body) == ({}, {"maxReplicaCount": 0, "minReplicaCount": 0})
    manager.scale_to_zero("research-serving")
    assert "was not scaled to zero" in caplog.text


def test_scale_sends_the_number_of_replicas(control, manager):
    control.on(f"{_PATCH}:scale", deployment("UPDATING"))
    assert manager.scale("research-serving", 3).state == "UPDATING"
    assert [seen.body for seen in control.calls(f"{_PATCH}:scale")] == [{"replicaCount": 3}]


def test_a_failed_delete_is_only_logged(control, manager, caplog):
    manager.delete("research-serving")
    assert "was not deleted" in caplog.text


def test_hot_load_sends_the_protocol_s_headers_and_body(control, manager):
    control.on(_LOAD, {"status": "ok"})
    metadata = {"previous_snapshot_identity": "step_0-ab", "compression_format": "arc_v2"}
    manager.hotload("research-serving", _MODEL, "step_0-ab")
    manager.hotload("research-serving", _MODEL, "step_1-ab", metadata, reset_prompt_cache=False)
    first, second = control.calls(_LOAD)
    assert first.body == {"identity": "step_0-ab", "reset_prompt_cache": True}
    assert second.body == {
        "identity": "step_1-ab",
        "reset_prompt_cache": False,
        "incremental_snapshot_metadata": metadata,
    }
    assert first.headers["fireworks-model"] == _MODEL
    assert first.headers["fireworks-deployment"] == "accounts/local/deployments/research-serving"
    assert first.headers["authorization"] == "Bearer fw_test"
    assert first.headers["x-api-key"] == "fw_test"


def test_a_hot_load_is_waited_for_until_every_replica_serves_it(control, manager):
    control.on(
        _STATUS,
        {"replicas": []},
        {"replicas": [replica("old", stage="loading", target="new"), replica("new")]},
        (502, {}),
        {"replicas": [replica("new"), replica("new")]},
    )
    assert manager.wait_for_hotload("research-serving", _MODEL, "new")
    assert len(control.calls(_STATUS)) == 4


def test_a_hot_load_that_failed_is_false_and_its_reason_logged(control, manager, caplog):
    control.on(_STATUS, {"replicas": [replica("old", stage="error", target="new")]})
    assert not manager.wait_for_hotload("research-serving", _MODEL, "new")
    assert "could not load 'new'" in caplog.text


def test_a_hot_load_that_takes_too_long_is_false(control, manager, manual_time):
    control.on(_STATUS, {"replicas": [replica("old", stage="loading", target="new")]})
    assert not manager.wait_for_hotload("research-serving", _MODEL, "new", timeout_seconds=40)
    assert sum(manual_time.slept) == pytest.approx(40)


def test_hot_load_and_wait_does_both(control, manager):
    control.on(_LOAD, {"status": "ok"})
    control.on(_STATUS, {"replicas": [replica("new")]})
    assert manager.hotload_and_wait("research-serving", _MODEL, "new")


def test_an_unknown_snapshot_is_raised_with_the_server_s_words(control, manager):
    control.on(_LOAD, (400, {"error": {"message": "no snapshot 'x'; there are: step_0-ab"}}))
    with pytest.raises(httpx.HTTPStatusError, match="there are: step_0-ab"):
        manager.hotload_and_wait("research-serving", _MODEL, "x")


@pytest.mark.parametrize(
    ("replicas", "verdict"),
    [
        ([], HotLoadVerdict.WAITING),
        ([replica("new")], HotLoadVerdict.SERVING),
        ([replica("new", ready=False)], HotLoadVerdict.WAITING),
        ([replica(None)], HotLoadVerdict.WAITING),
        ([replica("new"), replica("old")], HotLoadVerdict.WAITING),
        ([replica("old", stage="error", target="new")], HotLoadVerdict.FAILED),
        ([replica("new"), replica("old", stage="error", target="new")], HotLoadVerdict.FAILED),
        ([replica("old", stage="error", target="older")], HotLoadVerdict.WAITING),
        ([replica("new", stage="error", target="older")], HotLoadVerdict.SERVING),
    ],
)
def test_a_status_is_judged_over_all_replicas(replicas, verdict):
    assert judge({"replicas": replicas}, "new").verdict is verdict


def test_a_status_without_replicas_is_an_error():
    with pytest.raises(RuntimeError, match="list of replicas"):
        judge({"status": "ok"}, "new")


def test_warm_up_tries_until_an_answer_comes_or_its_tries_are_used(control, manager, manual_time):
    control.on(_PROBE, (503, {}), httpx.ConnectError("no"), {"choices": []})
    assert manager.warmup("accounts/local/deployments/research-serving")
    control.on(_PROBE, (503, {}))
    assert not manager.warmup("accounts/local/deployments/research-serving", max_retries=3)
    assert len(control.calls(_PROBE)) == 6
