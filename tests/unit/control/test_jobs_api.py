from __future__ import annotations

import json
from typing import Any

import pytest

from homefire.checkpoints import ensure_tiny
from homefire.control.jobs import LARGEST_LORA_RANK

JOBS = "/v1/accounts/local/rlorTrainerJobs"


async def test_a_job_without_an_id_gets_one(control: Any) -> None:
    created = await control.call("POST", JOBS, {"trainingConfig": {"baseModel": "tiny"}})
    assert created["name"].startswith("accounts/local/rlorTrainerJobs/job-")


async def test_a_job_says_what_it_trains_and_where_its_snapshots_lie(
    bench: Any, control: Any
) -> None:
    job = await control.create_job(displayName="my run", trainingConfig={"loraRank": 4})
    assert job["displayName"] == "my run"
    assert job["trainerMode"] == "LORA_TRAINER"
    assert job["trainingConfig"]["maxContextLength"] == 2048
    assert job["hotLoadBucketUrl"] == f"file://{bench.home.store}/local/j1/"
    assert job["createTime"].endswith("Z")


async def test_hosted_fields_are_kept_and_said_to_have_no_effect(control: Any) -> None:
    hosted = {
        "purpose": "x",
        "useReservation": True,
        "reservationTarget": "r",
        "preemptible": True,
        "inactivityTimeout": "1800s",
        "disableInactivityCleanup": True,
        "trainerReplicaCount": 2,
    }
    machine = {"acceleratorType": "NVIDIA_H200_141GB", "acceleratorCount": 8}
    job = await control.create_job(**hosted, trainingConfig=machine)
    assert {name: job[name] for name in hosted} == hosted
    assert job["trainingConfig"].items() >= machine.items()
    message = job["status"]["message"]
    assert message.startswith("Warning: acceleratorType, acceleratorCount, trainerReplicaCount,")
    for name in ("inactivityTimeout", "useReservation", "reservationTarget", "preemptible"):
        assert name in message


async def test_what_every_client_sends_anyway_is_no_warning(control: Any) -> None:
    job = await control.create_job(useReservation=True, trainingConfig={"learningRate": 1e-5})
    assert job["status"]["message"] == (
        "learningRate recorded, not applied: optim_step decides; "
        "useReservation recorded, not applied: this machine is your own"
    )


@pytest.mark.parametrize(
    ("body", "code", "named"),
    [
        ({}, "invalid_argument", "trainingConfig.baseModel"),
        ({"trainingConfig": {"baseModel": "nope"}}, "unknown_model", "baseModel"),
        ({"trainingConfig": {"baseModel": "/etc"}}, "unknown_model", "baseModel"),
        (
            {"trainingConfig": {"baseModel": "tiny", "loraRank": -1}},
            "invalid_argument",
            "trainingConfig.loraRank",
        ),
        (
            {"trainingConfig": {"baseModel": "tiny", "loraRank": LARGEST_LORA_RANK + 1}},
            "invalid_argument",
            "trainingConfig.loraRank",
        ),
        (
            {"trainingConfig": {"baseModel": "tiny", "maxContextLength": 4096}},
            "sequence_too_long",
            "trainingConfig.maxContextLength",
        ),
        (
            {"trainingConfig": {"baseModel": "tiny", "projectionHeadDim": 8}},
            "unsupported",
            "trainingConfig.projectionHeadDim",
        ),
        (
            {"trainingConfig": {"baseModel": "tiny", "extraArgs": ["--fp8"]}},
            "unsupported",
            "trainingConfig.extraArgs",
        ),
        (
            {"trainingConfig": {"baseModel": "tiny"}, "extraValues": {"a": "b"}},
            "unsupported",
            "extraValues",
        ),
        (
            {"trainingConfig": {"baseModel": "tiny"}, "inactivityTimeout": "soon"},
            "invalid_argument",
            "inactivityTimeout",
        ),
        (
            {"trainingConfig": {"baseModel": "tiny", "loraRank": "eight"}},
            "invalid_argument",
            "trainingConfig.loraRank",
        ),
    ],
)
async def test_what_cannot_be_trained_is_refused_before_there_is_a_job(
    bench: Any, control: Any, body: Any, code: str, named: str
) -> None:
    refused = await control.call("POST", f"{JOBS}?rlorTrainerJobId=j1", body, expect=400)
    assert refused["error"]["code"] == code
    assert refused["error"]["param"] == named
    await control.call("GET", f"{JOBS}/j1", expect=404)
    assert not bench.launcher.started


async def test_a_hosted_model_without_an_alias_fails_at_create_with_what_is_missing(
    control: Any,
) -> None:
    shape = "accounts/fireworks/trainingShapes/qwen3-8b-128k-h200"
    version = await control.call("GET", f"/v1/{shape}/versions")
    assert version["trainingShapeVersions"][0]["snapshot"]["maxSupportedContextLength"] == 131072
    refused = await control.call("POST", f"{JOBS}?trainingShape={shape}", {}, expect=400)
    assert refused["error"]["code"] == "unknown_model"
    assert "--alias accounts/fireworks/models/qwen3-8b=" in refused["error"]["hint"]


async def test_a_shape_gives_the_model_and_the_mode(control: Any) -> None:
    shape = "accounts/local/trainingShapes/tiny-reference"
    path = f"{JOBS}?rlorTrainerJobId=ref&trainingShape={shape}/versions/v1"
    job = await control.call("POST", path, {})
    assert job["trainerMode"] == "FORWARD_ONLY"
    assert job["trainingConfig"]["baseModel"] == "accounts/local/models/tiny"


@pytest.mark.parametrize(("shape", "rank"), [("tiny-full", 8), ("tiny-lora", 0)])
async def test_a_rank_that_does_not_fit_the_shape_is_refused(
    control: Any, shape: str, rank: int
) -> None:
    path = f"{JOBS}?trainingShape=accounts/local/trainingShapes/{shape}"
    refused = await control.call("POST", path, {"trainingConfig": {"loraRank": rank}}, expect=400)
    assert shape in refused["message"]


async def test_an_unknown_shape_is_a_404_that_says_what_there_is(control: Any) -> None:
    path = f"{JOBS}?trainingShape=accounts/local/trainingShapes/nope"
    refused = await control.call("POST", path, {}, expect=404)
    assert refused["error"]["code"] == "unknown_shape"
    assert "trainingShapes/tiny-full" in refused["error"]["hint"]


async def test_a_list_comes_in_pages(control: Any) -> None:
    for name in ("a", "b", "c"):
        await control.create_job(name)
    query = "pageSize=2&filter=training_config.lora_rank%3D0&orderBy=name"
    first = await control.call("GET", f"{JOBS}?{query}")
    names = [job["name"].rpartition("/")[2] for job in first["rlorTrainerJobs"]]
    token = first["nextPageToken"]
    second = await control.call("GET", f"{JOBS}?{query}&pageToken={token}")
    names += [job["name"].rpartition("/")[2] for job in second["rlorTrainerJobs"]]
    assert names == ["a", "b", "c"]
    assert second["nextPageToken"] == ""
    assert second["totalSize"] == 3


async def test_tombstones_are_listed_when_asked_for(control: Any) -> None:
    await control.create_job("gone")
    await control.create_job("here")
    await control.call("DELETE", f"{JOBS}/gone")
    await control.job_becomes("JOB_STATE_DELETED", "gone")
    assert (await control.call("GET", JOBS))["totalSize"] == 1
    query = "showDeleted=true&filter=state%3DJOB_STATE_DELETED"
    (found,) = (await control.call("GET", f"{JOBS}?{query}"))["rlorTrainerJobs"]
    assert found["name"].endswith("/gone")


@pytest.mark.parametrize("query", ["pageSize=x", "pageSize=-1", "pageToken=-5", "pageToken=²"])
async def test_a_page_that_was_never_given_out_is_refused(control: Any, query: str) -> None:
    refused = await control.call("GET", f"{JOBS}?{query}", expect=400)
    assert refused["error"]["code"] == "invalid_argument"


async def test_checkpoints_have_the_types_of_the_protocol_oldest_first(
    bench: Any, control: Any
) -> None:
    await control.create_job()
    base = bench.save_snapshot("step_1")
    bench.save_state("state_1")
    bench.save_snapshot("step_2", parent=base, step=2)
    rows = (await control.call("GET", f"{JOBS}/j1/checkpoints?pageSize=200"))["checkpoints"]
    found = [(r["name"].rpartition("/")[2], r["checkpointType"], r["promotable"]) for r in rows]
    assert found == [
        ("step_1", "CHECKPOINT_TYPE_INFERENCE_BASE", True),
        ("state_1", "CHECKPOINT_TYPE_TRAINING", False),
        ("step_2", "CHECKPOINT_TYPE_INFERENCE_ARC_V2", True),
    ]
    assert rows[2]["parent"] == "step_1"


async def test_managed_fine_tuning_is_refused_by_name(control: Any) -> None:
    await control.create_job()
    refused = await control.call("POST", f"{JOBS}/j1:executeTrainStep", {}, expect=400)
    assert refused["error"]["code"] == "unsupported"


async def test_another_accounts_job_does_not_exist(control: Any) -> None:
    await control.create_job()
    other = {"x-homefire-account": "other"}
    await control.call("GET", f"{JOBS}/j1", expect=404, headers=other)
    path = "/v1/accounts/other/rlorTrainerJobs/j1"
    await control.call("GET", path, expect=404, headers=other)
    await control.call("DELETE", path, expect=404, headers=other)
    listed = await control.call("GET", "/v1/accounts/other/rlorTrainerJobs", headers=other)
    assert listed["rlorTrainerJobs"] == []


async def test_a_job_and_a_deployment_cannot_both_own_the_bucket(control: Any) -> None:
    await control.create_job("follows")
    await control.create_deployment(
        "d1", hotLoadTrainerJob="accounts/local/rlorTrainerJobs/follows"
    )
    refused = await control.create_job("writes", hotLoadDeploymentId="d1", expect=400)
    assert refused["message"].startswith("hotload flow mismatch: ")
    await control.call("GET", f"{JOBS}/writes", expect=404)


@pytest.mark.parametrize(
    "path", ["dpoJobs", "dpoJobs/j/checkpoints", "supervisedFineTuningJobs/j:cancel", "datasets"]
)
@pytest.mark.parametrize("method", ["GET", "POST", "PATCH", "DELETE"])
async def test_what_only_the_hosted_service_has_is_refused_by_name(
    control: Any, method: str, path: str
) -> None:
    refused = await control.call(method, f"/v1/accounts/local/{path}", expect=400)
    assert refused["error"]["code"] == "unsupported"
    assert refused["details"][0]["reason"] == "UNSUPPORTED"
    assert path.partition("/")[0].partition(":")[0] in refused["message"]


async def test_a_collection_that_nobody_has_does_not_exist(control: Any) -> None:
    await control.call("GET", "/v1/accounts/local/dpoJobsOfMine", expect=404)
    await control.call("DELETE", JOBS, expect=405)


async def test_a_context_past_what_the_rope_allows_is_refused_with_the_reason(
    bench: Any, control: Any
) -> None:
    directory = ensure_tiny(bench.home.models / "stretched")
    config = json.loads((directory / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "longrope", "original_max_position_embeddings": 64}
    (directory / "config.json").write_text(json.dumps(config))
    asked = {"baseModel": "stretched", "maxContextLength": 65}
    for refused in (
        await control.create_job(expect=400, trainingConfig=asked),
        await control.create_deployment(expect=400, **asked),
    ):
        assert "between 1 and 64, the limit of stretched" in str(refused)
        assert "longrope rope depends on the longest text of the batch" in str(refused)
    job = await control.create_job(trainingConfig={"baseModel": "stretched"})
    assert job["trainingConfig"]["maxContextLength"] == 64
