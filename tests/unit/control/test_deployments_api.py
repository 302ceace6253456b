from __future__ import annotations

from typing import Any

import pytest

from homefire.checkpoints import ensure_tiny

ALL = "/v1/accounts/local/deployments"
ONE = f"{ALL}/d1"


async def test_a_deployment_asked_for_with_no_replicas_starts_one(bench: Any, control: Any) -> None:
    await control.create_deployment(minReplicaCount=0, maxReplicaCount=1)
    found = await control.call("GET", ONE)
    assert (found["state"], found["replicaCount"]) == ("READY", 1)
    assert found["replicaStats"]["readyReplicaCount"] == 1
    assert [p.spec.name for p in bench.launcher.running()] == ["replica d1/0"]


async def test_scaling_to_zero_stops_the_replicas_and_up_again_starts_one(
    bench: Any, control: Any
) -> None:
    await control.create_deployment(description="kept")
    await control.deployment_becomes("READY")
    await control.call("PATCH", ONE, {"maxReplicaCount": 0, "minReplicaCount": 0})
    await control.deployment_becomes("READY")
    assert not bench.launcher.running()
    route = control.plane.routes.get().deployments["local/d1"]
    assert "scaled to zero" in route.detail
    found = await control.call("PATCH", ONE, {"maxReplicaCount": 1})
    assert found["description"] == "kept"
    await control.deployment_becomes("READY")
    assert len(bench.launcher.running()) == 1


async def test_a_deployment_scaled_to_zero_is_started_by_a_request_with_its_minimum(
    bench: Any, control: Any
) -> None:
    await control.create_deployment(minReplicaCount=2, maxReplicaCount=3)
    await control.deployment_becomes("READY")
    await control.call("PATCH", f"{ONE}:scale", {"replicaCount": 0})
    await control.deployment_becomes("READY")
    assert not bench.launcher.running()
    route = control.plane.routes.get().deployments["local/d1"]
    assert route.is_asleep
    assert "a request starts one" in route.detail
    await control.call("POST", "/internal/deployments/wake", {"account": "local", "service": "d1"})
    await control.deployment_becomes("READY")
    assert len(bench.launcher.running()) == 2
    assert not control.plane.routes.get().deployments["local/d1"].is_asleep


async def test_a_maximum_of_zero_says_that_no_request_shall_start_one(
    bench: Any, control: Any
) -> None:
    await control.create_deployment()
    await control.deployment_becomes("READY")
    await control.call("PATCH", ONE, {"maxReplicaCount": 0, "minReplicaCount": 0})
    await control.deployment_becomes("READY")
    await control.call("POST", "/internal/deployments/wake", {"account": "local", "service": "d1"})
    await control.deployment_becomes("READY")
    assert not bench.launcher.running()
    unknown = {"account": "other", "service": "d1"}
    await control.call("POST", "/internal/deployments/wake", unknown, expect=404)


async def test_a_patch_without_a_mask_touches_only_the_fields_given(control: Any) -> None:
    await control.create_deployment(
        displayName="a", annotations={"k": "v"}, hotLoadTransitionType="SYNC"
    )
    patched = await control.call("PATCH", ONE, {"displayName": "b", "someNewField": 1})
    assert patched["displayName"] == "b"
    assert patched["annotations"] == {"k": "v"}
    assert patched["hotLoadTransitionType"] == "SYNC"


async def test_a_patch_with_a_mask_touches_only_its_fields_and_resets_what_is_not_given(
    control: Any,
) -> None:
    await control.create_deployment(displayName="a", description="d", placement={"region": "X"})
    patched = await control.call(
        "PATCH", f"{ONE}?updateMask=display_name,placement.region", {"description": "ignored"}
    )
    assert patched["displayName"] == ""
    assert patched["description"] == "d"
    assert patched["placement"] is None


async def test_a_mask_of_something_unknown_is_refused_with_what_there_is(control: Any) -> None:
    await control.create_deployment()
    refused = await control.call("PATCH", f"{ONE}?updateMask=state", {}, expect=400)
    assert refused["error"]["param"] == "updateMask"
    assert "hot_load_trainer_job" in refused["error"]["hint"]


MASK = f"{ONE}?updateMask=hot_load_trainer_job"


async def test_a_deployment_that_is_attached_to_another_trainer_updates_and_is_ready_again(
    bench: Any, control: Any
) -> None:
    await control.create_job("j1")
    await control.create_job("j2")
    await control.create_deployment(hotLoadTrainerJob="accounts/local/rlorTrainerJobs/j1")
    await control.deployment_becomes("READY")
    second = "accounts/local/rlorTrainerJobs/j2"
    patched = await control.call("PATCH", MASK, {"hotLoadTrainerJob": second})
    assert (patched["state"], patched["hotLoadTrainerJob"]) == ("UPDATING", second)
    found = await control.call("GET", ONE)
    assert (found["state"], found["hotLoadTrainerJob"]) == ("READY", second)
    assert found["hotLoadBucketUrl"].endswith("/local/j2/")
    assert len(bench.launcher.running()) == 3
    again = await control.call("PATCH", MASK, {"hotLoadTrainerJob": second})
    assert again["state"] == "READY"


async def test_a_deployment_cannot_be_attached_to_what_it_could_not_load(
    bench: Any, control: Any
) -> None:
    await control.create_deployment()
    missing = {"hotLoadTrainerJob": "accounts/local/rlorTrainerJobs/nope"}
    await control.call("PATCH", MASK, missing, expect=404)
    ensure_tiny(bench.home.models / "other")
    await control.create_job("j2", trainingConfig={"baseModel": "other"})
    refused = await control.call("PATCH", MASK, {"hotLoadTrainerJob": "j2"}, expect=400)
    assert "snapshots would not fit" in refused["message"]
    assert (await control.call("GET", ONE))["hotLoadTrainerJob"] is None


async def test_a_trainer_that_does_not_exist_cannot_be_followed(control: Any) -> None:
    refused = await control.create_deployment(hotLoadTrainerJob="nope", expect=404)
    assert "trainer job 'nope' does not exist" in refused["message"]


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (
            {"hotLoadBucketUrl": "gs://b/p", "hotLoadTrainerJob": "j1"},
            "hot_load_bucket_url gs://b/p conflicts with hot_load_trainer_job j1",
        ),
        ({"hotLoadBucketUrl": "gs://b/p"}, "hotLoadBucketUrl gs://b/p is not supported"),
        ({"hotLoadBucketType": "S3"}, "hotLoadBucketType 'S3' is not supported"),
        ({"hotLoadTransitionType": "NEVER"}, "hotLoadTransitionType 'NEVER' is unknown"),
        ({"minReplicaCount": 2, "maxReplicaCount": 1}, "0 <= min <= max"),
        ({"maxReplicaCount": -1}, "0 <= min <= max"),
        ({"maxReplicaCount": 65}, "0 <= min <= max"),
        ({"baseModel": "nope"}, "base model 'nope' is unknown"),
        ({"maxContextLength": 0}, "maxContextLength 0"),
        ({"extraArgs": ["--x"]}, "extraArgs are arguments of the hosted service"),
        ({"extraValues": {"a": "b"}}, "extraValues are arguments of the hosted service"),
        ({"precision": "FP8"}, "precision 'FP8' is not supported"),
    ],
)
async def test_what_cannot_be_served_is_refused_before_there_is_a_deployment(
    control: Any, body: dict[str, Any], text: str
) -> None:
    await control.create_job("j1")
    refused = await control.create_deployment(expect=400, **body)
    assert text in refused["message"]
    await control.call("GET", ONE, expect=404)


async def test_a_trainer_that_writes_to_one_deployment_cannot_be_followed_by_another(
    control: Any,
) -> None:
    await control.create_job("j1", hotLoadDeploymentId="other")
    refused = await control.create_deployment(hotLoadTrainerJob="j1", expect=400)
    assert refused["message"].startswith("hotload flow mismatch: ")


async def test_a_deployment_of_another_base_model_than_its_trainers_is_refused(
    bench: Any, control: Any
) -> None:
    await control.create_job("j1")
    ensure_tiny(bench.home.models / "other")
    refused = await control.create_deployment(baseModel="other", hotLoadTrainerJob="j1", expect=400)
    assert "snapshots would not fit" in refused["message"]


async def test_a_deployment_without_a_model_takes_its_trainers(control: Any) -> None:
    await control.create_job("j1")
    found = await control.call(
        "POST", f"{ALL}?deploymentId=d1", {"baseModel": None, "hotLoadTrainerJob": "j1"}
    )
    assert found["baseModel"] == "tiny"
    assert found["hotLoadTrainerJob"] == "accounts/local/rlorTrainerJobs/j1"


async def test_a_hard_deletion_leaves_nothing_and_its_id_can_be_used_again(
    bench: Any, control: Any
) -> None:
    await control.create_deployment()
    await control.deployment_becomes("READY")
    assert await control.call("DELETE", f"{ONE}?ignoreChecks=true&hard=true") == {}

    async def is_gone() -> bool:
        return not (await control.plane.deployments.list("local"))

    await control.eventually(is_gone)
    await control.call("GET", ONE, expect=404)
    assert not bench.launcher.running()
    await control.create_deployment()


async def test_a_soft_deletion_leaves_a_tombstone_that_gives_way_to_a_new_deployment(
    control: Any,
) -> None:
    await control.create_deployment()
    await control.deployment_becomes("READY")
    await control.call("DELETE", ONE)
    await control.deployment_becomes("DELETED")
    assert (await control.call("GET", ONE))["state"] == "DELETED"
    assert (await control.call("GET", ALL))["deployments"] == []
    refused = await control.call("PATCH", ONE, {"maxReplicaCount": 1}, expect=400)
    assert "is DELETED" in refused["message"]
    assert await control.call("DELETE", ONE) == {}
    await control.create_deployment()
    await control.deployment_becomes("READY")


async def test_a_tombstone_is_listed_when_asked_for_and_can_be_brought_back(
    bench: Any, control: Any
) -> None:
    await control.create_deployment(description="kept")
    await control.deployment_becomes("READY")
    early = await control.call("POST", f"{ONE}:undelete", {}, expect=400)
    assert early["error"]["code"] == "failed_precondition"
    await control.call("DELETE", ONE)
    await control.deployment_becomes("DELETED")
    (found,) = (await control.call("GET", f"{ALL}?showDeleted=true"))["deployments"]
    assert found["state"] == "DELETED"
    revived = await control.call("POST", f"{ONE}:undelete", {})
    assert (revived["state"], revived["description"]) == ("CREATING", "kept")
    await control.deployment_becomes("READY")
    assert len(bench.launcher.running()) == 1


async def test_an_asynchronous_transition_is_kept(control: Any) -> None:
    found = await control.create_deployment(hotLoadTransitionType="ASYNC", preemptible=True)
    assert found["hotLoadTransitionType"] == "ASYNC"
    assert found["status"]["message"] == (
        "preemptible recorded, not applied: this machine is your own"
    )


async def test_a_transition_of_our_own_is_not_shown_to_clients_that_would_stop_at_it(
    control: Any,
) -> None:
    found = await control.create_deployment(hotLoadTransitionType="DRAIN")
    assert found["hotLoadTransitionType"] == "HOT_LOAD_TRANSITION_TYPE_UNSPECIFIED"


async def test_a_second_deployment_of_the_same_id_is_a_conflict(control: Any) -> None:
    await control.create_deployment()
    refused = await control.create_deployment(expect=409)
    assert refused["error"]["code"] == "already_exists"


async def test_more_replicas_than_the_maximum_are_refused(control: Any) -> None:
    await control.create_deployment()
    refused = await control.call("PATCH", f"{ONE}:scale", {"replicaCount": 2}, expect=400)
    assert "maxReplicaCount 1" in refused["message"]


async def test_a_base_model_is_for_good(control: Any) -> None:
    await control.create_deployment()
    await control.call("PATCH", ONE, {"baseModel": "tiny"})
    refused = await control.call("PATCH", ONE, {"baseModel": "x"}, expect=400)
    assert "for good" in refused["message"]


async def test_a_base_model_answers_by_each_of_its_names_while_one_deployment_serves_it(
    control: Any,
) -> None:
    base = "accounts/local/models/tiny"
    await control.create_deployment("d1", baseModel=base)
    await control.deployment_becomes("READY")
    directory = str(control.plane.home.models / "tiny")
    routed = control.plane.routes.get().models
    assert routed == {f"local/{base}": "local/d1", f"local/{directory}": "local/d1"}
    await control.create_deployment("pool-1-sampler", baseModel=base)
    await control.deployment_becomes("READY", "pool-1-sampler")
    assert control.plane.routes.get().models == routed
    await control.create_deployment("d2", baseModel=base)
    await control.deployment_becomes("READY", "d2")
    assert control.plane.routes.get().models == {}


async def test_two_accounts_may_each_serve_the_same_base_model(control: Any) -> None:
    base = "accounts/fireworks/models/tiny"
    await control.create_deployment("d1", baseModel=base)
    created = await control.client.post(
        "/v1/accounts/other/deployments",
        params={"deploymentId": "theirs"},
        json={"baseModel": base},
        headers={"x-homefire-account": "other"},
    )
    assert created.status_code == 200, created.text
    await control.deployment_becomes("READY")
    routed = control.plane.routes.get().models
    assert routed[f"local/{base}"] == "local/d1"
    assert routed[f"other/{base}"] == "other/theirs"


async def shows_weights(control: Any) -> bool:
    (deployment, _) = (await control.call("GET", "/v1/models"))["data"]
    return deployment.get("homefire", {}).get("weights", {}).get("digest") == "9f86"


@pytest.mark.parametrize("prefix", ["/inference/v1", "/v1"])
async def test_models_are_the_deployments_and_the_base_models_they_answer_for(
    control: Any, bench: Any, prefix: str
) -> None:
    await control.create_deployment("d1", baseModel="accounts/local/models/tiny")
    await control.deployment_becomes("READY")
    bench.replica().say(digest="9f86")
    await control.eventually(lambda: shows_weights(control))
    deployment, base = (await control.call("GET", f"{prefix}/models"))["data"]
    assert deployment["id"] == "accounts/local/deployments/d1"
    assert deployment["root"] == base["id"] == "accounts/local/models/tiny"
    assert base["parent"] == deployment["id"]
    assert deployment["max_model_len"] == 2048
    assert deployment["homefire"]["weights"] == {"identity": "base", "digest": "9f86"}
    for model in (deployment, base):
        assert await control.call("GET", f"{prefix}/models/{model['id']}") == model
    assert await control.call("GET", f"{prefix}/models/d1") == deployment


async def test_a_model_that_is_not_served_names_those_that_are(control: Any) -> None:
    await control.create_deployment("d1")
    refused = await control.call("GET", "/v1/models/nope", expect=404)
    assert refused["error"]["code"] == "model_not_found"
    assert "accounts/local/deployments/d1" in refused["error"]["hint"]


async def test_the_models_of_another_account_are_not_listed(control: Any) -> None:
    await control.create_deployment("d1")
    response = await control.client.get("/v1/models", headers={"x-homefire-account": "other"})
    assert response.json()["data"] == []
