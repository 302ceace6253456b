"""The control-plane requests of the seed's run, in order, as the real client 1.2.0a68 sends them."""

from __future__ import annotations

from typing import Any

ALIAS = {"accounts/fireworks/models/qwen3-8b": "tiny"}
MODEL = "accounts/fireworks/models/qwen3-8b"
JOBS = "/v1/accounts/local/rlorTrainerJobs"
DEPLOYMENT = "/v1/accounts/local/deployments/research-serving"
HOT_LOAD = "/hot_load/v1/models/hot_load"
HOT_LOAD_HEADERS = {
    "fireworks-model": MODEL,
    "fireworks-deployment": "accounts/local/deployments/research-serving",
}


async def test_every_request_of_the_seeds_run_gets_the_answer_that_its_client_needs(
    bench: Any,
) -> None:
    control = await bench.control(aliases=ALIAS)
    call = control.call

    shapes = await call(
        "GET",
        "/v1/accounts/fireworks/trainingShapes/qwen3-8b-128k-h200/versions"
        "?filter=latest_validated%3Dtrue&pageSize=1",
    )
    shape = shapes["trainingShapeVersions"][0]
    snapshot = shape["snapshot"]
    assert shape["name"].endswith("/qwen3-8b-128k-h200/versions/v1")
    for read_by_the_client in (
        "trainerImageTag",
        "maxSupportedContextLength",
        "nodeCount",
        "deploymentShapeVersion",
        "deploymentImageTag",
        "acceleratorType",
        "acceleratorCount",
        "baseModelWeightPrecision",
        "trainerMode",
    ):
        assert snapshot[read_by_the_client], read_by_the_client
    assert snapshot["trainerShardingScheme"]["pipelineParallelism"] == 1

    accounts = await call("GET", "/v1/accounts?pageSize=2")
    assert [account["name"] for account in accounts["accounts"]] == ["accounts/local"]

    created = await call(
        "POST",
        f"{JOBS}?trainingShape=accounts%2Ffireworks%2FtrainingShapes%2Fqwen3-8b-128k-h200"
        "%2Fversions%2Fv1",
        {
            "serviceMode": True,
            "keepAlive": False,
            "dataset": "",
            "trainingConfig": {
                "baseModel": MODEL,
                "loraRank": 0,
                "learningRate": 1e-05,
                "gradientAccumulationSteps": 4,
            },
        },
    )
    job = created["name"].rpartition("/")[2]
    assert created["state"] == "JOB_STATE_CREATING"
    assert "gradientAccumulationSteps recorded, not applied" in created["status"]["message"]

    await call("GET", DEPLOYMENT, expect=404)
    deployment = await call(
        "POST",
        "/v1/accounts/local/deployments?deploymentId=research-serving",
        {
            "baseModel": MODEL,
            "minReplicaCount": 0,
            "maxReplicaCount": 1,
            "enableHotLoad": True,
            "hotLoadBucketType": "FW_HOSTED",
            "hotLoadTrainerJob": created["name"],
            "acceleratorType": "NVIDIA_H200_141GB",
        },
    )
    assert deployment["state"] in ("CREATING", "READY")
    assert deployment["hotLoadTrainerJob"] == created["name"]

    assert (await call("GET", f"{JOBS}/{job}"))["state"] == "JOB_STATE_RUNNING"
    assert (await call("GET", DEPLOYMENT))["state"] == "READY"

    for _ in range(2):
        status = await call("GET", HOT_LOAD, headers=HOT_LOAD_HEADERS)
        assert status == {
            "replicas": [
                {
                    "current_snapshot_identity": None,
                    "readiness": True,
                    "loading_state": {"stage": "idle"},
                    "homefire": {"digest": "", "canary": "absent", "attested_by": ""},
                }
            ]
        }

    base = bench.save_snapshot("step_00000-4b50536f", job=job)
    bench.save_snapshot("step_00010-4b50536f", job=job, parent=base, step=10)
    await _hot_load(call, {"identity": "step_00000-4b50536f", "reset_prompt_cache": True})
    delta = {
        "identity": "step_00010-4b50536f",
        "reset_prompt_cache": True,
        "incremental_snapshot_metadata": {
            "previous_snapshot_identity": "step_00000-4b50536f",
            "compression_format": "arc_v2",
            "checksum_format": "alder32",
        },
    }
    await _hot_load(call, delta)

    for _ in range(2):
        assert (await call("GET", f"{JOBS}/{job}"))["state"] == "JOB_STATE_RUNNING"

    listed = await call("GET", f"{JOBS}/{job}/checkpoints?pageSize=200")
    assert [row["name"].rpartition("/")[2] for row in listed["checkpoints"]] == [
        "step_00000-4b50536f",
        "step_00010-4b50536f",
    ]
    assert listed["nextPageToken"] == ""

    patched = await call(
        "PATCH",
        f"{DEPLOYMENT}?updateMask=hot_load_trainer_job",
        {"hotLoadTrainerJob": created["name"]},
    )
    assert patched["hotLoadTrainerJob"] == created["name"]
    parked = await call("PATCH", DEPLOYMENT, {"maxReplicaCount": 0, "minReplicaCount": 0})
    assert parked["hotLoadTrainerJob"] == created["name"]
    assert await call("DELETE", f"{DEPLOYMENT}?ignoreChecks=true&hard=true") == {}
    assert await call("DELETE", f"{JOBS}/{job}") == {}


async def _hot_load(call: Any, body: dict[str, Any]) -> None:
    await call("POST", HOT_LOAD, body, headers=HOT_LOAD_HEADERS)
    status = await call("GET", HOT_LOAD, headers=HOT_LOAD_HEADERS)
    (replica,) = status["replicas"]
    assert replica["current_snapshot_identity"] == body["identity"]
    assert replica["readiness"] is True


async def test_a_client_that_names_its_job_gets_a_conflict_the_second_time_and_then_the_job(
    bench: Any,
) -> None:
    control = await bench.control(aliases=ALIAS)
    path = f"{JOBS}?rlorTrainerJobId=training-api-service-9b043aaf"
    body = {"trainingConfig": {"baseModel": MODEL}, "useReservation": True}
    await control.call("POST", path, body)
    refused = await control.call("POST", path, body, expect=409)
    assert refused["code"] == 6
    found = await control.call("GET", f"{JOBS}/training-api-service-9b043aaf")
    assert found["state"] == "JOB_STATE_RUNNING"
