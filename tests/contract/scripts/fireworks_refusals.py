"""What the newest SDK can ask for and homefire does not have: each asked for once."""

from __future__ import annotations

import asyncio
import base64

import httpx
from findings import Findings
from fireworks_plane import (
    KEY,
    MODEL,
    PACE_S,
    URL,
    datum,
    deployments,
    jobs,
    sdk,
    service_of,
    step,
    tinker,
)

found = Findings()
NAME = "refusing"
plane = sdk.FireworksClient(api_key=KEY, base_url=URL)
made: dict = {}
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


def complete(**fields):
    """As the SDK's sampler sends it."""
    run = made["sampler"].async_completions_stream(prompt=[1, 2], max_tokens=2, **fields)
    return asyncio.run(run)


@found.step
def set_up():
    created = jobs.create(sdk.TrainerJobConfig(base_model=MODEL, lora_rank=4))
    deployments.create_or_get(
        sdk.DeploymentConfig(
            deployment_id=NAME, base_model=MODEL, hot_load_trainer_job=created.job_name
        )
    )
    made["endpoint"] = jobs.wait_for_ready(created.job_id, poll_interval_s=PACE_S)
    made["service"] = service_of(made["endpoint"])
    made["client"] = made["service"].create_training_client(base_model=MODEL, lora_rank=4)
    deployments.wait_for_ready(NAME, poll_interval_s=PACE_S)
    made["sampler"] = sdk.DeploymentSampler(
        inference_url=deployments.inference_url,
        model=f"accounts/{deployments.account_id}/deployments/{NAME}",
        api_key=KEY,
    )


@found.step
def rdma_weight_sync():
    """The SDK does not ask a trainer that does not offer it, so it is asked by hand."""
    answer = httpx.post(
        f"{made['endpoint'].base_url}/api/v1/weight_sync",
        headers={"X-Api-Key": KEY},
        json={"model_id": "m", "seq_id": 1, "transport": "RDMA"},
        trust_env=False,
    )
    answer.raise_for_status()


@found.step
def router_replay_in_training():
    row = datum("homefire")
    matrices = [base64.b64encode(bytes(4)).decode()] * 7
    given = row.model_input.model_copy(update={"routing_matrices": matrices})
    replayed = tinker.Datum(model_input=given, loss_fn_inputs=row.loss_fn_inputs)
    made["client"].forward_backward([replayed], "cross_entropy").result()


@found.step
def router_replay_in_sampling():
    complete(include_routing_matrix=True, logprobs=True)


@found.step
def sampling_mask():
    """By hand too: the SDK wants a trainer that shares its storage first."""
    answer = httpx.post(
        f"{URL}/inference/v1/completions",
        headers={"X-Api-Key": KEY},
        json={"model": made["sampler"].model, "prompt": [1], "sampling_mask": "parquet_v1"},
        trust_env=False,
    )
    answer.raise_for_status()


@found.step
def images_in_training():
    image = tinker.types.ImageChunk(data=PIXEL, format="png", expected_tokens=2)
    row = datum("homefire")
    chunks = [*row.model_input.chunks, image]
    seen = tinker.Datum(
        model_input=tinker.ModelInput(chunks=chunks), loss_fn_inputs=row.loss_fn_inputs
    )
    made["client"].forward_backward([seen], "cross_entropy").result()


@found.step
def images_in_sampling():
    complete(images=[base64.b64encode(PIXEL).decode()])


@found.step
def export_precision():
    made["client"].save_weights_for_sampler(
        "exported", checkpoint_type="merged_base", export_precision="nvfp4"
    ).result()


@found.step
def loss_dppo():
    made["client"].forward_backward([datum("homefire")], "dppo").result()


@found.step
def loss_reinforce():
    """The SDK refuses it by itself, since the trainer does not offer it."""
    made["client"].forward_backward([datum("homefire")], "reinforce").result()


@found.step
def projection_head():
    made["service"].create_training_client(base_model=MODEL, lora_rank=4, projection_head_dim=8)


@found.step
def projection_head_of_a_job():
    jobs.create(sdk.TrainerJobConfig(base_model=MODEL, projection_head_dim=8))


@found.step
def trainer_arguments():
    jobs.create(sdk.TrainerJobConfig(base_model=MODEL, extra_args=["--quantize=fp8"]))


@found.step
def deployment_arguments():
    config = sdk.DeploymentConfig(
        deployment_id="other", base_model=MODEL, extra_args=["--quantize=fp8"]
    )
    deployments.create_or_get(config)


@found.step
def managed_fine_tuning():
    plane.list_training_job_checkpoints("accounts/local/supervisedFineTuningJobs/j")


@found.step
def serverless_sessions():
    plane.list_training_session_checkpoints("accounts/local/trainingSessions/s")


@found.step
def step_behind_refused_passes():
    """A gradient that lacks what was refused is not stepped."""
    step(made["client"])


@found.step
def after_all_that():
    """Nothing else was lost: the trainer trains and the deployment answers."""
    metrics = step(made["client"])
    return {"norm": metrics["grad_norm"], "warm": deployments.warmup(made["sampler"].model)}


found.report()
