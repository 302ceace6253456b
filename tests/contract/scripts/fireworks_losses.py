"""The SDK's built-in losses and what a pass returns beside logprobs, adapters taken over and merged."""

from __future__ import annotations

import itertools
import math

import torch
from findings import Findings
from fireworks_plane import (
    KEY,
    MODEL,
    PACE_S,
    URL,
    batch,
    datum,
    delete_job,
    deployments,
    jobs,
    logprobs,
    sdk,
    service_of,
    step,
    tinker,
)

found = Findings()
made: dict = {}
OLD, ADVANTAGES = -5.5, (0.5, -1.0)
"""The behaviour policy's logprob, and the advantage of each row of `batch`."""
CLIP = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.28}
STILL = tinker.AdamParams(learning_rate=0.0, beta1=0.9, beta2=0.95, eps=1e-8)


def new_client(lora_rank: int = 8) -> tuple[str, object]:
    created = jobs.create(sdk.TrainerJobConfig(base_model=MODEL, lora_rank=lora_rank))
    endpoint = jobs.wait_for_ready(created.job_id, poll_interval_s=PACE_S)
    client = service_of(endpoint).create_training_client(base_model=MODEL, lora_rank=lora_rank)
    return created.job_id, client


def rl_batch() -> list:
    def constant(value: float, like: object) -> object:
        count = len(like.data)
        return tinker.TensorData(data=[value] * count, dtype="float32", shape=[count])

    rows = []
    for row, advantage in zip(batch(), ADVANTAGES, strict=True):
        targets = row.loss_fn_inputs["target_tokens"]
        inputs = {
            "target_tokens": targets,
            "logprobs": constant(OLD, targets),
            "advantages": constant(advantage, targets),
        }
        rows.append(tinker.Datum(model_input=row.model_input, loss_fn_inputs=inputs))
    return rows


def surrogate(ratio: float, advantage: float) -> float:
    clipped = min(max(ratio, CLIP["clip_low_threshold"]), CLIP["clip_high_threshold"])
    return -min(ratio * advantage, clipped * advantage)


def by_hand(name: str, rows: list[list[float]]) -> float:
    total = 0.0
    for row, advantage in zip(rows, ADVANTAGES, strict=True):
        mean = sum(p - OLD for p in row) / len(row)
        for p in row:
            ratio = math.exp(mean if name == "gspo" else p - OLD)
            if name == "cispo":
                low, high = CLIP["clip_low_threshold"], CLIP["clip_high_threshold"]
                total -= min(max(ratio, low), high) * p * advantage
            elif name == "dro":
                total -= p * advantage - 0.5 * 0.05 * (p - OLD) ** 2
            elif name == "dapo" and advantage < 0:
                total += min(surrogate(ratio, advantage), -1.1 * advantage)
            else:
                total += surrogate(ratio, advantage)
    return total


CONFIGS = {
    "ppo": {**CLIP, "ratio_log_cap": 20.0},
    "cispo": {**CLIP, "ratio_log_cap": 20.0},
    "dro": {"beta": 0.05},
    "gspo": {**CLIP, "seq_ratio_log_cap": 10.0},
    "dapo": {**CLIP, "ratio_log_cap": 20.0, "eps_clip_c": 1.1},
}


@found.step
def create():
    made["job"], made["client"] = new_client()
    return [step(made["client"])["grad_norm"] for _ in range(2)]


@found.step
def losses():
    """Each as the server computes it, and by hand from the logprobs."""
    rows = logprobs(made["client"])
    results = {}
    for name, config in CONFIGS.items():
        future = made["client"].forward_backward(rl_batch(), name, loss_fn_config=config)
        results[name] = [future.result().metrics["loss:sum"], by_hand(name, rows)]
    made["client"].optim_step(STILL).result()
    return results


@found.step
def dro_without_beta():
    return made["client"].forward_backward(rl_batch(), "dro").result().metrics


@found.step
def step_after_a_refusal():
    """It clears what was there, and says so."""
    return made["client"].optim_step(STILL).result().metrics


@found.step
def forward_top_k():
    """All 320 of the vocabulary: their chances add up to one, and the targets are among them."""
    future = made["client"].forward(batch(), "cross_entropy", loss_fn_config={"top_k": 320})
    output = future.result().loss_fn_outputs[0]
    best, ids = list(output["top_k_logprobs"].data), list(output["top_k_indices"].data)
    shape = list(output["top_k_logprobs"].shape)
    own = list(output["logprobs"].data)
    targets = list(batch()[0].loss_fn_inputs["target_tokens"].data)
    at = [ids[320 * i : 320 * (i + 1)].index(target) for i, target in enumerate(targets)]
    return {
        "shape": shape,
        "descending": all(a >= b for a, b in itertools.pairwise(best[:320])),
        "sum": sum(math.exp(value) for value in best[:320]),
        "off": max(abs(best[320 * i + k] - own[i]) for i, k in enumerate(at)),
    }


@found.step
def emit_grad_norm_metrics():
    made["client"].forward_backward(batch(), "cross_entropy").result()
    metrics = made["client"].optim_step(STILL, emit_grad_norm_metrics="basic").result().metrics
    return {name: metrics.get(name) for name in ("grad_norm", "grad_norm_clipped", "grad_max_abs")}


@found.step
def custom_loss_on_embeddings():
    """C and 10 C, of the embeddings and of their cosines."""
    norms = {}
    for output in ("embedding", "cos_similarity_matrix"):
        for factor in (1.0, 10.0):

            def loss(data, rows, factor=factor):
                return factor * (torch.stack(list(rows)) ** 2).sum(), {"rows": float(len(rows))}

            future = made["client"].forward_backward_custom(
                batch(), loss, output=output, pooling="mean"
            )
            rows = future.result().metrics["rows"]
            metrics = made["client"].optim_step(STILL).result().metrics
            norms[f"{output} {factor}"] = [rows, metrics["grad_norm"]]
    return norms


@found.step
def projection():
    future = made["client"].forward_backward_custom(
        batch(), lambda data, rows: (rows[0].sum(), {}), output="projection"
    )
    return future.result().metrics


@found.step
def forward_backward_contrastive():
    client = made["client"]
    # Each query's positive is the text unlike it, so that there is much to learn from any adapter.
    data = [datum("aa"), datum("bbbb"), datum("bb"), datum("aaa"), datum("cd")]
    adam = tinker.AdamParams(learning_rate=0.05, beta1=0.9, beta2=0.95, eps=1e-8)
    losses = []
    for _ in range(6):
        future = client.forward_backward_contrastive(
            data, num_queries=2, temperature=0.2, num_extra_negatives=1
        )
        losses.append(future.result().metrics["loss"])
        client.optim_step(adam).result()
    return losses


@found.step
def merged_base():
    client = made["client"]
    merged = client.save_weights_for_sampler_ext("whole", checkpoint_type="merged_base")
    adapter = client.save_weights_for_sampler_ext("adapter")
    made["merged"] = merged.snapshot_name
    fireworks = sdk.FireworksClient(api_key=KEY, base_url=URL)
    rows = {row["name"]: row["checkpointType"] for row in fireworks.list_checkpoints(made["job"])}
    kinds = {}
    for saved, model in ((merged, "whole-model"), (adapter, "adapter-model")):
        name = next(name for name in rows if name.endswith(f"/checkpoints/{saved.snapshot_name}"))
        promoted = fireworks.promote_checkpoint(name=name, output_model_id=model, base_model=MODEL)
        kinds[model] = [rows[name], promoted["kind"]]
    return kinds


@found.step
def load_adapter():
    job, client = new_client()
    fresh = logprobs(client)
    client.load_adapter(f"accounts/{jobs.account_id}/models/adapter-model").result()
    taught, loaded = logprobs(made["client"]), logprobs(client)
    delete_job(job)
    return {"fresh": fresh == taught, "loaded": loaded == taught}


@found.step
def load_adapter_of_another_rank():
    made["other"], client = new_client(lora_rank=4)
    return str(client.load_adapter(f"accounts/{jobs.account_id}/models/adapter-model").result())


@found.step
def merged_base_is_served():
    delete_job(made["other"])
    job = f"accounts/{jobs.account_id}/rlorTrainerJobs/{made['job']}"
    deployments.create_or_get(
        sdk.DeploymentConfig("served", base_model=MODEL, hot_load_trainer_job=job)
    )
    deployments.wait_for_ready("served", poll_interval_s=PACE_S)
    return deployments.hotload_and_wait("served", MODEL, made["merged"], timeout_seconds=60)


found.report()
