"""Trainer jobs through the SDK's TrainerJobManager."""

from __future__ import annotations

from findings import Findings
from fireworks_plane import (
    MODEL,
    PACE_S,
    cancel,
    delete_job,
    job_path,
    jobs,
    mean_logprob,
    rest,
    sdk,
    service_of,
    step,
)

found = Findings()
SHAPE = "accounts/fireworks/trainingShapes/qwen3-8b-128k-h200"
made: dict = {}


def client_of(endpoint):
    return service_of(endpoint).create_training_client(base_model=MODEL, lora_rank=0)


@found.step
def resolve_training_profile():
    profile = jobs.resolve_training_profile(SHAPE)
    made["profile"] = profile
    return {
        "version": profile.training_shape_version,
        "shape": profile.training_shape,
        "mode": getattr(profile, "trainer_mode", None),  # not in 1.0.0a52
        "context": profile.max_supported_context_length,
        "deployment_shape": profile.deployment_shape,
    }


@found.step
def unknown_shape():
    return jobs.resolve_training_profile("accounts/local/trainingShapes/nothing-like-it")


@found.step
def create():
    config = sdk.TrainerJobConfig(
        base_model=MODEL,
        training_shape_ref=made["profile"].training_shape_version,
        display_name="first",
    )
    created = jobs.create(config)
    made["job"] = created.job_id
    return {"id": created.job_id, "name": created.job_name}


@found.step
def wait_for_ready():
    endpoint = jobs.wait_for_ready(made["job"], poll_interval_s=PACE_S)
    made["client"] = client_of(endpoint)
    before = mean_logprob(made["client"])
    step(made["client"])
    made["trained"] = mean_logprob(made["client"])
    return {"job": endpoint.job_id, "before": before, "after": made["trained"]}


@found.step
def get():
    job = jobs.get(made["job"])
    return {name: job[name] for name in ("name", "displayName", "state", "trainerMode")}


@found.step
def wait_for_existing():
    endpoint = jobs.wait_for_existing(made["job"], poll_interval_s=PACE_S)
    return {"same": mean_logprob(client_of(endpoint)) - made["trained"]}


@found.step
def reconnect_and_wait():
    """Of a cancelled job: it is resumed, with the weights that it had."""
    cancel(made["job"])
    endpoint = jobs.reconnect_and_wait(made["job"], poll_interval_s=PACE_S)
    return {"same": mean_logprob(client_of(endpoint)) - made["trained"]}


@found.step
def resume_and_wait():
    cancel(made["job"])
    endpoint = jobs.resume_and_wait(made["job"], poll_interval_s=PACE_S)
    client = client_of(endpoint)
    resumed = mean_logprob(client)
    step(client)
    made["client"] = client
    return {"same": resumed - made["trained"], "goes_on": mean_logprob(client) - resumed}


@found.step
def reconnect_to_nothing():
    jobs.reconnect_and_wait("nothing", poll_interval_s=PACE_S, max_wait_for_resumable_s=0.1)


@found.step
def try_get():
    return {"there": jobs.try_get(made["job"])["state"], "nowhere": jobs.try_get("nothing")}


@found.step
def create_again_under_the_same_id():
    config = sdk.TrainerJobConfig(base_model=MODEL, requested_job_id=made["job"])
    return jobs.create(config).job_id


@found.step
def unknown_base_model():
    jobs.create(sdk.TrainerJobConfig(base_model="accounts/fireworks/models/nobody-has-it"))


@found.step
def delete():
    made["client"].save_state("kept").result()
    delete_job(made["job"])
    rows = rest("GET", f"{job_path(made['job'])}/checkpoints")["checkpoints"]
    return {
        "state": jobs.get(made["job"])["state"],
        "checkpoints": [row["name"].rpartition("/")[2] for row in rows],
    }


@found.step
def create_and_wait():
    config = sdk.TrainerJobConfig(base_model=MODEL, lora_rank=4)
    endpoint = jobs.create_and_wait(config, poll_interval_s=PACE_S)
    client = service_of(endpoint).create_training_client(base_model=MODEL, lora_rank=4)
    before = mean_logprob(client)
    step(client)
    return {
        "before": before,
        "after": mean_logprob(client),
        "mode": jobs.get(endpoint.job_id)["trainerMode"],
        "context": getattr(endpoint, "max_context_length", None),
    }


found.report()
