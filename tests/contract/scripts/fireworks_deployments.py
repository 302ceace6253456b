"""Deployments and hot loads through the SDK's DeploymentManager and WeightSyncer."""

from __future__ import annotations

import asyncio

import httpx
from findings import Findings
from fireworks_plane import (
    KEY,
    MODEL,
    PACE_S,
    URL,
    delete_deployment,
    deployment_path,
    deployments,
    job_path,
    jobs,
    rest,
    sdk,
    service_of,
    step,
    until,
)

found = Findings()
NAME = "serving"
made: dict = {}


def new_trainer() -> tuple[object, object]:
    """A job and a client that trains it."""
    created = jobs.create(sdk.TrainerJobConfig(base_model=MODEL))
    endpoint = jobs.wait_for_ready(created.job_id, poll_interval_s=PACE_S)
    return created, service_of(endpoint).create_training_client(base_model=MODEL, lora_rank=0)


def served() -> str:
    """What a completion says that it came from."""
    answer = httpx.post(
        f"{URL}/inference/v1/completions",
        headers={"Authorization": f"Bearer {KEY}"},
        json={"model": f"accounts/local/deployments/{NAME}", "prompt": [1, 2], "max_tokens": 1},
        trust_env=False,
    )
    return answer.raise_for_status().headers["x-homefire-weights"].split(";")[0]


def resource() -> dict:
    return rest("GET", deployment_path(NAME))


@found.step
def create_or_get():
    made["job"], made["client"] = new_trainer()
    config = sdk.DeploymentConfig(
        deployment_id=NAME,
        base_model=MODEL,
        hot_load_trainer_job=made["job"].job_name,
        min_replica_count=0,
        max_replica_count=1,
    )
    first, second = deployments.create_or_get(config), deployments.create_or_get(config)
    return [first.name, second.name, first.inference_model]


@found.step
def wait_for_ready():
    return deployments.wait_for_ready(NAME, poll_interval_s=PACE_S).state


@found.step
def get():
    info = deployments.get(NAME)
    return {
        "state": info.state,
        "bucket": info.hot_load_bucket_url,
        "nowhere": deployments.get("nothing"),
    }


@found.step
def warmup():
    return deployments.warmup(f"accounts/local/deployments/{NAME}", retry_interval_s=PACE_S)


@found.step
def hotload_check_status():
    (replica,) = deployments.hotload_check_status(NAME, MODEL)["replicas"]
    return replica


@found.step
def hotload():
    made["saved"] = made["client"].save_weights_for_sampler_ext("first").snapshot_name
    deployments.hotload(NAME, MODEL, made["saved"])
    done = deployments.wait_for_hotload(
        NAME, MODEL, expected_identity=made["saved"], poll_interval=PACE_S
    )
    return {"done": done, "saved": made["saved"], "served": served()}


@found.step
def hotload_and_wait():
    step(made["client"])
    saved = made["client"].save_weights_for_sampler_ext("second", checkpoint_type="delta")
    metadata = {
        "previous_snapshot_identity": made["saved"],
        "compression_format": sdk.DEFAULT_DELTA_COMPRESSION,
        "checksum_format": sdk.DEFAULT_CHECKSUM_FORMAT,
    }
    done = deployments.hotload_and_wait(
        NAME,
        MODEL,
        saved.snapshot_name,
        incremental_snapshot_metadata=metadata,
        reset_prompt_cache=False,
    )
    return {"done": done, "saved": saved.snapshot_name, "served": served()}


@found.step
def hotload_of_nothing():
    return deployments.hotload_and_wait(NAME, MODEL, "nothing-like-it")


@found.step
def what_is_served_after_a_failed_hotload():
    return served()


@found.step
def prompt_cache_policies():
    """Over REST: the SDK's own argument is a boolean."""
    headers = {"X-Api-Key": KEY, "fireworks-deployment": f"accounts/local/deployments/{NAME}"}
    statuses = {}
    for policy in (True, False, "all", "new_session", "none", "some"):
        answer = httpx.post(
            f"{URL}/hot_load/v1/models/hot_load",
            headers=headers,
            json={"identity": made["saved"], "reset_prompt_cache": policy},
            trust_env=False,
        )
        statuses[str(policy)] = answer.status_code
    return {"statuses": statuses, "param": answer.json()["error"]["param"]}


@found.step
def weight_syncer():
    """A base, then deltas of what was saved last; after a reset a base again."""
    tracker = sdk.WeightSyncer(
        policy_client=made["client"],
        deploy_mgr=deployments,
        deployment_id=NAME,
        base_model=MODEL,
        first_checkpoint_type="base",
    )
    tracker.wait_for_hotload_ready(poll_interval_s=1)
    synced = []
    for name in ("sync_0", "sync_1"):
        step(made["client"])
        saved = tracker.save_and_hotload(name)
        synced.append([saved, tracker.check_deployment_state(), served()])
    step(made["client"])
    only = tracker.save_only("sync_2", "delta")
    loaded = tracker.hotload(only, "delta")
    synced.append([only, tracker.check_deployment_state(), served()])
    made["tracker"] = tracker
    return {
        "job": made["job"].job_id,
        "synced": synced,
        "loaded": loaded,
        "timing": sorted(tracker.last_timing),
    }


@found.step
def reset_delta_chain():
    made["tracker"].reset_delta_chain()
    step(made["client"])
    return {"saved": made["tracker"].save_and_hotload("fresh"), "served": served()}


@found.step
def get_deployment_sampler():
    """Of the deployment that is synced."""
    sampler = made["tracker"].get_deployment_sampler()
    run = sampler.sample_with_prompt_tokens(prompt_token_ids=[5, 7], max_tokens=2)
    (completion,) = asyncio.run(run)
    return [sampler.model, completion.full_tokens[:2]]


@found.step
def ledger():
    """Over REST. Emptied, it begins anew, and a delta still finds its whole chain."""
    path = f"{deployment_path(NAME)}/ledger"
    before = [entry["identity"] for entry in rest("GET", path)["entries"] if entry["ok"]]
    rest("DELETE", path)
    emptied = rest("GET", path)["entries"]
    step(made["client"])
    saved = made["client"].save_weights_for_sampler_ext("onward", "delta").snapshot_name
    done = deployments.hotload_and_wait(NAME, MODEL, saved)
    after = [[entry["identity"], entry["ok"]] for entry in rest("GET", path)["entries"]]
    return {"before": before, "emptied": emptied, "done": done, "after": after, "saved": saved}


@found.step
def snapshots():
    """Name, kind and parent of what the job saved so far."""
    rows = rest("GET", f"{job_path(made['job'].job_id)}/checkpoints")["checkpoints"]
    return [[row["name"].rpartition("/")[2], row["kind"], row["parent"]] for row in rows]


@found.step
def update():
    info = deployments.update(
        NAME,
        body={"displayName": "shown", "description": "out of the mask"},
        update_mask="display_name",
    )
    shown = resource()
    return {"name": info.name, "displayName": shown["displayName"], "text": shown["description"]}


@found.step
def update_of_what_cannot_be():
    deployments.update(NAME, body={"state": "READY"}, update_mask=["state", "display_name"])


@found.step
def reattach_trainer():
    """The deployment serves on, and from then on loads what the other trainer saves."""
    job, client = new_trainer()
    before = served()
    info = deployments.reattach_trainer(
        NAME,
        base_model=MODEL,
        trainer_job_name=job.job_name,
        timeout_s=60,
        poll_interval_s=PACE_S,
    )
    kept = served()
    step(client)
    saved = client.save_weights_for_sampler_ext("other", checkpoint_type="base").snapshot_name
    done = deployments.hotload_and_wait(NAME, MODEL, saved)
    return {
        "follows": info.hot_load_trainer_job == job.job_name,
        "kept": kept == before,
        "done": done,
        "served": served() == saved,
    }


@found.step
def hotload_from_the_trainer_before():
    deployments.hotload_and_wait(NAME, MODEL, made["saved"])


@found.step
def scale_to_zero():
    deployments.scale_to_zero(NAME)
    until(lambda: resource()["state"] == "READY")
    down = resource()
    rest("PATCH", deployment_path(NAME), {"maxReplicaCount": 1})
    deployments.wait_for_ready(NAME, poll_interval_s=PACE_S)
    return {
        "down": [down["replicaCount"], down["maxReplicaCount"]],
        "kept": down["displayName"],
        "up": served() != "base",
    }


@found.step
def force_recreate():
    """Without a trainer: it serves the base model again."""
    config = sdk.DeploymentConfig(deployment_id=NAME, base_model=MODEL, max_replica_count=1)
    deployments.create_or_get(config, force_recreate=True)
    deployments.wait_for_ready(NAME, poll_interval_s=PACE_S)
    return {"served": served(), "follows": resource()["hotLoadTrainerJob"]}


@found.step
def delete():
    delete_deployment(NAME)
    deployments.delete(NAME)
    return {"left": deployments.get(NAME), "job": jobs.get(made["job"].job_id)["state"]}


found.report()
