"""Checkpoints of a job and their promotion through the SDK's FireworksClient."""

from __future__ import annotations

import warnings

from findings import Findings
from fireworks_plane import (
    KEY,
    MODEL,
    PACE_S,
    URL,
    delete_job,
    deployments,
    jobs,
    mean_logprob,
    rest,
    sdk,
    service_of,
    step,
)

found = Findings()
plane = sdk.FireworksClient(api_key=KEY, base_url=URL)
made: dict = {}


def new_client(base_model: str = MODEL, **config):
    created = jobs.create(sdk.TrainerJobConfig(base_model=base_model, **config))
    endpoint = jobs.wait_for_ready(created.job_id, poll_interval_s=PACE_S)
    rank = config.get("lora_rank", 0)
    client = service_of(endpoint).create_training_client(base_model=base_model, lora_rank=rank)
    return created, client


def name_of(checkpoint: str) -> str:
    return f"{made['job'].job_name}/checkpoints/{checkpoint}"


def promoted(checkpoint: str, model: str) -> dict:
    """By the form that this release has."""
    if not hasattr(plane, "list_checkpoints"):  # 1.0.0a52
        return plane.promote_checkpoint(made["job"].job_id, checkpoint, model)
    return plane.promote_checkpoint(
        name=name_of(checkpoint), output_model_id=model, base_model=MODEL
    )


@found.step
def list_checkpoints():
    """A base, a delta, a train state; oldest first, in pages of one."""
    made["job"], client = new_client()
    step(client)
    made["base"] = client.save_weights_for_sampler_ext("one").snapshot_name
    step(client)
    made["delta"] = client.save_weights_for_sampler_ext("two", "delta").snapshot_name
    made["logprob"] = mean_logprob(client)
    client.save_state("state").result()
    rows = plane.list_checkpoints(made["job"].job_id, page_size=1)
    return {
        "saved": [made["base"], made["delta"], "state"],
        "rows": [
            [row["name"].removeprefix(name_of("")), row["checkpointType"], row["promotable"]]
            for row in rows
        ],
    }


@found.step
def set_up():
    """For the release without list_checkpoints, whose step of that name ended at its end."""
    return [made["base"], made["delta"]]


@found.step
def promote_checkpoint():
    """A base: the model that it makes is an ordinary one."""
    model = promoted(made["base"], "of-a-base")
    return {name: model[name] for name in ("name", "state", "kind", "checkpoint")}


@found.step
def promote_a_delta():
    """Its chain is applied, so a trainer on the new model begins where this one stood."""
    model = promoted(made["delta"], "of-a-delta")
    _, client = new_client(base_model=model["name"])
    return {"kind": model["kind"], "same": mean_logprob(client) - made["logprob"]}


@found.step
def promote_again():
    """The same checkpoint under the same name is the same model."""
    return promoted(made["delta"], "of-a-delta")["name"]


@found.step
def promote_another_under_a_taken_name():
    promoted(made["base"], "of-a-delta")


@found.step
def promote_positional():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model = plane.promote_checkpoint(
            made["job"].job_id, made["base"], "positional", base_model=MODEL
        )
    return model["name"]


@found.step
def promote_a_state():
    promoted("state", "of-a-state")


@found.step
def promote_nothing():
    promoted("nothing-like-it", "of-nothing")


@found.step
def promote_with_another_base_model():
    plane.promote_checkpoint(
        name=name_of(made["base"]),
        output_model_id="of-another",
        base_model="accounts/local/models/of-a-base",
    )


@found.step
def promote_from_a_deleted_job():
    delete_job(made["job"].job_id)
    return promoted(made["base"], "of-a-tombstone")["state"]


@found.step
def promote_an_adapter():
    made["job"], client = new_client(lora_rank=4)
    step(client)
    saved = client.save_weights_for_sampler_ext("adapter").snapshot_name
    model = promoted(saved, "of-an-adapter")
    return {"kind": model["kind"], "peft": model["peftDetails"]}


@found.step
def deploy_a_promoted_model():
    for job in rest("GET", f"/v1/accounts/{plane.account_id}/rlorTrainerJobs")["rlorTrainerJobs"]:
        delete_job(job["name"].rpartition("/")[2])
    config = sdk.DeploymentConfig(
        deployment_id="promoted", base_model="accounts/local/models/of-a-delta"
    )
    deployments.create_or_get(config)
    state = deployments.wait_for_ready("promoted", poll_interval_s=PACE_S).state
    return [state, deployments.warmup("accounts/local/deployments/promoted")]


@found.step
def model_is_moe():
    return plane.model_is_moe(MODEL)


found.report()
