"""The research loop on your own machine: bootstrap, train on an objective of your own, sync, evaluate.

    homefire up                       # in one terminal
    eval "$(homefire env)"            # in another
    python examples/lifecycle.py

It is the example of the Fireworks training documentation with one import line changed and the
placeholders filled in: the built-in model `tiny` learns to sort three digits (`527` -> `257`).
"""

import asyncio
import os
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import tinker
import torch

from homefire.sdk import (
    AdaptiveConcurrencyController,
    DeploymentConfig,
    DeploymentManager,
    DeploymentSampler,
    FiretitanServiceClient,
    TrainerJobConfig,
    TrainerJobManager,
    WeightSyncer,
)

BASE_MODEL = "accounts/local/models/tiny"
SHAPE_ID = "accounts/local/trainingShapes/tiny-full"
DEPLOYMENT_ID = "research-serving"
TOTAL_STEPS, EVAL_INTERVAL, RECONNECT_AT = 160, 40, 80
BATCH_ROWS, LEARNING_RATE, FOCUS = 64, 1e-3, 1.0

api_key = os.environ["FIREWORKS_API_KEY"]
base_url = os.environ.get("FIREWORKS_BASE_URL", "http://127.0.0.1:8700")
rng = random.Random(0)

# 1. Bootstrap: request the trainer and its deployment, then wait for both in parallel.

rlor_mgr = TrainerJobManager(api_key=api_key, base_url=base_url)
deploy_mgr = DeploymentManager(api_key=api_key, base_url=base_url)

profile = rlor_mgr.resolve_training_profile(SHAPE_ID)
created = rlor_mgr.create(
    TrainerJobConfig(
        base_model=BASE_MODEL,
        training_shape_ref=profile.training_shape_version,
        lora_rank=0,
        learning_rate=LEARNING_RATE,
    )
)
print(f"Trainer requested: {created.job_id}")
deploy_info = deploy_mgr.create_or_get(
    DeploymentConfig(
        deployment_id=DEPLOYMENT_ID,
        base_model=BASE_MODEL,
        hot_load_trainer_job=created.job_name,
    ),
    force_recreate=True,
)
with ThreadPoolExecutor(max_workers=2) as pool:
    trainer = pool.submit(rlor_mgr.wait_for_ready, created.job_id)
    deployment = pool.submit(deploy_mgr.wait_for_ready, deploy_info.deployment_id)
    endpoint, deploy_info = trainer.result(), deployment.result()

service = FiretitanServiceClient(base_url=endpoint.base_url, api_key=api_key)
training_client = service.create_training_client(base_model=BASE_MODEL, lora_rank=0)
tokenizer = training_client.get_tokenizer()

# 2. The objective and the batches: yours to replace.


def prompt_tokens(digits):
    options = {"tokenize": True, "add_generation_prompt": True, "return_dict": False}
    return tokenizer.apply_chat_template([{"role": "user", "content": digits}], **options)


def build_batch():
    """Rows of numbers and their digits in order; `weights` mark the answer's tokens."""
    batch = []
    for _ in range(BATCH_ROWS):
        digits = "".join(rng.choices("0123456789", k=3))
        prompt = prompt_tokens(digits)
        answer = [*tokenizer.encode("".join(sorted(digits))), tokenizer.eos_token_id]
        tokens = [*prompt, *answer]
        weights = [0.0] * (len(prompt) - 1) + [1.0] * len(answer)
        inputs = {"target_tokens": np.array(tokens[1:]), "weights": np.array(weights, np.float32)}
        batch.append(tinker.Datum(tinker.ModelInput.from_ints(tokens[:-1]), inputs))
    return batch


def objective(data, logprobs_list):
    """Focal loss: tokens that the model already predicts well count less (arXiv:1708.02002)."""
    logprobs = torch.cat(logprobs_list)
    weights = torch.cat([datum.loss_fn_inputs["weights"].to_torch() for datum in data])
    focus = (1 - logprobs.exp()) ** FOCUS
    loss = -(weights * focus * logprobs).sum() / weights.sum()
    return loss, {"loss": float(loss.item())}


# 3. Snapshots, weight sync and evaluation through the deployment.

tracker = WeightSyncer(
    policy_client=training_client,
    deploy_mgr=deploy_mgr,
    deployment_id=DEPLOYMENT_ID,
    base_model=BASE_MODEL,
)
sampler = DeploymentSampler(
    inference_url=deploy_mgr.inference_url,
    model=f"accounts/{deploy_mgr.account_id}/deployments/{DEPLOYMENT_ID}",
    api_key=api_key,
    tokenizer=tokenizer,
    concurrency_controller=AdaptiveConcurrencyController(initial_window=16),
)
eval_numbers = [f"{number:03d}" for number in range(7, 1000, 10)]


async def evaluate(snapshot):
    """Share of exact answers; every completion must come from `snapshot`."""

    async def is_right(digits):
        messages = [{"role": "user", "content": digits}]
        (completion,) = await sampler.sample_with_tokens(
            messages, n=1, max_tokens=8, temperature=0.0, expect_identity=snapshot
        )
        return completion.text == "".join(sorted(digits))

    return np.mean(await asyncio.gather(*map(is_right, eval_numbers))).item()


# 4. The loop, with a reconnect in the middle as after a crash of this script.

for step in range(1, TOTAL_STEPS + 1):
    if step == RECONNECT_AT:
        endpoint = rlor_mgr.reconnect_and_wait(created.job_id, timeout_s=300)
        service = FiretitanServiceClient(base_url=endpoint.base_url, api_key=api_key)
        training_client = service.create_training_client(base_model=BASE_MODEL, lora_rank=0)
        tracker.policy_client = training_client
        print(f"Reconnected to {created.job_id}")
    backward = training_client.forward_backward_custom(build_batch(), objective)
    training_client.optim_step(tinker.AdamParams(learning_rate=LEARNING_RATE)).result()
    if step % EVAL_INTERVAL == 0:
        snapshot = tracker.save_and_hotload(f"step_{step:05d}")
        score = asyncio.run(evaluate(snapshot))
        loss = backward.result().metrics["loss"]
        print({"step": step, "loss": round(loss, 3), "snapshot": snapshot, "eval_score": score})

# 5. Tidy up: checkpoints of a deleted job stay listed.

service.close()
deploy_mgr.delete(DEPLOYMENT_ID)
rlor_mgr.delete(created.job_id)
