"""A service that the SDK provisions by itself: trainer, reference, deployment, and their end."""

from __future__ import annotations

import warnings

from findings import Findings
from fireworks_plane import (
    KEY,
    MODEL,
    PACE_S,
    URL,
    deployments,
    job_path,
    jobs,
    logprobs,
    mean_logprob,
    rest,
    sdk,
    step,
    tinker,
    until,
)

found = Findings()
SHAPE = "accounts/fireworks/trainingShapes/qwen3-8b-128k-h200"
PROMPT = list(b"homefire ")
FIREWORKS_KEY = f"fw_{KEY}"
"""A key that begins with `tml-` it takes for another service's."""
made: dict = {}
warnings.simplefilter("ignore", DeprecationWarning)


def managed(**config):
    config = {"base_model": MODEL, "training_shape_id": SHAPE, **config}
    return sdk.FiretitanServiceClient.from_firetitan_config(
        api_key=FIREWORKS_KEY, base_url=URL, **config
    )


def until_gone(job_id: str) -> str:
    until(lambda: jobs.get(job_id)["state"] == "JOB_STATE_DELETED")
    return jobs.get(job_id)["state"]


@found.step
def from_firetitan_config():
    """A policy of all parameters, a reference of its own, and a deployment."""
    service = managed(
        reference_required=True,
        cleanup_trainer_on_close=True,
        cleanup_deployment_on_close="delete",
        inactivity_timeout="1800s",
        display_name="managed",
    )
    client = service.create_training_client()
    made.update(service=service, client=client)
    before = mean_logprob(client)
    step(client)
    made["trainer"], made["deployment"] = service.trainer_job_id, service.deployment_id
    job = jobs.get(service.trainer_job_id)
    return {
        "before": before,
        "after": mean_logprob(client),
        "shown": [job["displayName"], job["inactivityTimeout"], job["trainingShape"]],
        "context": service.max_context_length,
        "follows": rest("GET", f"/v1/accounts/local/deployments/{service.deployment_id}")[
            "hotLoadTrainerJob"
        ],
    }


@found.step
def create_reference_client():
    """Frozen, on a trainer of its own."""
    reference = made["service"].create_reference_client()
    first = logprobs(reference)
    step(made["client"])
    made["reference"] = made["service"].reference_job_id
    return {
        "still": logprobs(reference) == first,
        "apart": made["reference"] != made["trainer"],
        "mode": jobs.get(made["reference"])["trainerMode"],
        "base": mean_logprob(reference),
    }


@found.step
def create_sampling_client():
    """The deployment comes to serve the saved snapshot, and goes on with it after more training."""
    client = made["client"]
    saved = client.save_weights_for_sampler("first").result().path
    sampler = made["service"].create_sampling_client(model_path=saved)
    params = tinker.SamplingParams(max_tokens=4, temperature=1.0)
    prompt = tinker.ModelInput.from_ints(PROMPT)
    sequences = sampler.sample(prompt=prompt, num_samples=2, sampling_params=params).result()
    status = deployments.hotload_check_status(made["deployment"], MODEL)["replicas"][0]
    return {
        "served": status["current_snapshot_identity"] == saved,
        "lengths": [len(s.tokens) == len(s.logprobs) for s in sequences.sequences],
    }


@found.step
def create_deployment_sampler():
    """The next save is a delta of the first, and what it samples is scored as the trainer does."""
    import asyncio

    client = made["client"]
    step(client)
    saved = client.save_weights_for_sampler("second").result().path
    sampler = made["service"].create_deployment_sampler(model_path=saved)
    run = sampler.sample_with_prompt_tokens(
        prompt_token_ids=PROMPT, max_tokens=4, temperature=0.0, logprobs=True, ignore_eos=True
    )
    (completion,) = asyncio.run(run)
    row = completion.full_tokens
    target = tinker.TensorData(data=row[1:], dtype="int64", shape=[len(row) - 1])
    datum = tinker.Datum(
        model_input=tinker.ModelInput.from_ints(row[:-1]),
        loss_fn_inputs={"target_tokens": target},
    )
    rows = rest("GET", f"{job_path(made['trainer'])}/checkpoints")["checkpoints"]
    return {
        "sampled": list(completion.inference_logprobs),
        "trained": logprobs(client, [datum])[0][len(PROMPT) - 1 :],
        "kinds": [row["kind"] for row in rows],
    }


@found.step
def list_and_promote_checkpoints():
    service = made["service"]
    names = [row["name"] for row in service.list_checkpoints(service.trainer_job_id)]
    model = service.promote_checkpoint(name=names[-1], output_model_id="managed", base_model=MODEL)
    return {"count": len(names), "state": model["state"]}


@found.step
def close():
    """All that it made ends with it, and only that."""
    made["service"].close()
    until(lambda: deployments.get(made["deployment"]) is None)
    return [until_gone(made["trainer"]), until_gone(made["reference"])]


@found.step
def reattach():
    """A deployment of one service follows the trainer of the next; a borrowed one is left alone."""
    first = managed(cleanup_trainer_on_close=True)
    client = first.create_training_client()
    saved = client.save_weights_for_sampler("one").result().path
    first.create_sampling_client(model_path=saved)
    deployment = first.deployment_id
    first.close()
    until_gone(first.trainer_job_id)
    second = managed(
        deployment_id=deployment,
        cleanup_trainer_on_close=True,
        cleanup_deployment_on_close="delete",
        reattach_poll_interval_s=PACE_S,
    )
    client = second.create_training_client()
    step(client)
    other = client.save_weights_for_sampler("two").result().path
    second.create_sampling_client(model_path=other)
    status = deployments.hotload_check_status(deployment, MODEL)["replicas"][0]
    second.close()
    until_gone(second.trainer_job_id)
    left = deployments.get(deployment)
    deployments.delete(deployment)
    until(lambda: deployments.get(deployment) is None)
    return {
        "served": status["current_snapshot_identity"] == other,
        "left": left.state,
        "follows": left.hot_load_trainer_job.endswith(second.trainer_job_id),
    }


@found.step
def cleanup_by_scaling_to_zero():
    service = managed(cleanup_trainer_on_close=True, cleanup_deployment_on_close="scale_to_zero")
    service.create_training_client()
    name = service.deployment_id
    service.close()
    path = f"/v1/accounts/local/deployments/{name}"
    until(lambda: rest("GET", path)["replicaCount"] == 0)
    state = rest("GET", path)["state"]
    deployments.delete(name)
    until(lambda: deployments.get(name) is None)
    until_gone(service.trainer_job_id)
    return state


@found.step
def managed_adapter():
    """The reference of an adapter is its base, on the same trainer."""
    service = managed(
        lora_rank=4,
        reference_required=True,
        training_shape_id="accounts/fireworks/trainingShapes/qwen3-8b-128k-lora",
        cleanup_trainer_on_close=True,
        cleanup_deployment_on_close="delete",
    )
    client = service.create_training_client()
    step(client)
    reference = service.create_reference_client()
    saved = client.save_weights_for_sampler("adapter").result().path
    service.create_sampling_client(model_path=saved)
    status = deployments.hotload_check_status(service.deployment_id, MODEL)["replicas"][0]
    found_here = {
        "policy": mean_logprob(client),
        "reference": mean_logprob(reference),
        "own_job": service.reference_job_id,
        "served": status["current_snapshot_identity"] == saved,
    }
    made["lora"] = service
    return found_here


@found.step
def close_of_the_adapter():
    made["lora"].close()
    return until_gone(made["lora"].trainer_job_id)


@found.step
def several_adapters():
    """One trainer, models of other ranks: the second is refused, and the first trains on."""
    service = managed(
        max_lora_rank=8,
        create_deployment=False,
        training_shape_id="accounts/fireworks/trainingShapes/qwen3-8b-128k-lora",
        cleanup_trainer_on_close=True,
    )
    made["several"] = service
    made["first"] = service.create_training_client(lora_rank=8)
    step(made["first"])
    service.create_training_client(lora_rank=4)


@found.step
def the_first_adapter_trains_on():
    before = mean_logprob(made["first"])
    step(made["first"])
    after = mean_logprob(made["first"])
    made["several"].close()
    return after - before


found.report()
