"""The SDK's training client: passes, optimizer steps, states, references."""

from __future__ import annotations

import torch
from findings import Findings
from fireworks_plane import (
    MODEL,
    PACE_S,
    batch,
    datum,
    delete_job,
    jobs,
    logprobs,
    mean_logprob,
    sdk,
    service_of,
    step,
    tinker,
)

found = Findings()
made: dict = {}
STILL = tinker.AdamParams(learning_rate=0.0, beta1=0.9, beta2=0.95, eps=1e-8)
"""Clears the gradient and changes nothing; its metrics tell the gradient's norm."""


def new_client(**config):
    created = jobs.create(sdk.TrainerJobConfig(base_model=MODEL, **config))
    endpoint = jobs.wait_for_ready(created.job_id, poll_interval_s=PACE_S)
    service = service_of(endpoint)
    rank = config.get("lora_rank", 0)
    client = service.create_training_client(base_model=MODEL, lora_rank=rank)
    return created.job_id, service, client


def norm(client, **options) -> float:
    return client.optim_step(STILL, **options).result().metrics["grad_norm"]


def scaled(factor: float):
    def loss(data, rows):
        return -factor * torch.cat([row.flatten() for row in rows]).sum(), {"mine": factor}

    return loss


@found.step
def create_training_client():
    made["job"], made["service"], made["client"] = new_client()
    return mean_logprob(made["client"])


@found.step
def get_server_capabilities():
    models = made["service"].get_server_capabilities().supported_models
    return [models[0].model_name, getattr(models[0], "max_context_length", None)]


@found.step
def get_info():
    info = made["client"].get_info()
    return [info.model_name, info.lora_rank, info.is_lora]


@found.step
def forward():
    """It leaves no gradient behind."""
    before = logprobs(made["client"])
    return {
        "rows": [len(row) for row in before],
        "again": before == logprobs(made["client"]),
        "gradient": norm(made["client"]),
    }


@found.step
def forward_backward():
    """The loss is the sum over tokens of minus weight times logprob, and adds up over calls."""
    data = [datum("homefire", weights=[0.0, 1.0, 2.0, 0.0, 0.5, 1.0, 1.0])]
    result = made["client"].forward_backward(data, "cross_entropy").result()
    row = list(result.loss_fn_outputs[0]["logprobs"].data)
    weights = data[0].loss_fn_inputs["weights"].data
    by_hand = -sum(w * lp for w, lp in zip(weights, row, strict=True))
    once = norm(made["client"])
    for _ in range(2):
        made["client"].forward_backward(data, "cross_entropy").result()
    return {
        "loss": result.metrics["loss:sum"],
        "by_hand": by_hand,
        "once": once,
        "twice": norm(made["client"]),
        "cleared": norm(made["client"]),
    }


@found.step
def forward_backward_custom():
    """C, 10 C and -C; the built-in loss is C."""
    client = made["client"]
    norms = {}
    for factor in (1.0, 10.0, -1.0):
        result = client.forward_backward_custom(batch(), scaled(factor)).result()
        norms[str(factor)] = norm(client)
    client.forward_backward(batch(), "cross_entropy").result()
    metrics = [value for name, value in result.metrics.items() if name.startswith("mine")]
    return {"norms": norms, "built_in": norm(client), "mine": metrics}


@found.step
def optim_step():
    before = mean_logprob(made["client"])
    metrics = step(made["client"])
    return {"before": before, "after": mean_logprob(made["client"]), "norm": metrics["grad_norm"]}


@found.step
def grad_clip_norm():
    """A clipped step and an unclipped one from the same state differ."""
    client = made["client"]
    client.save_state("unclipped").result()
    ends = []
    for clip in (0.0, 1e-3):
        client.load_state_with_optimizer(client.resolve_checkpoint_path("unclipped")).result()
        client.forward_backward(batch(), "cross_entropy").result()
        adam = tinker.AdamParams(learning_rate=1e-2, eps=1.0, grad_clip_norm=clip)
        client.optim_step(adam).result()
        ends.append(mean_logprob(client))
    return ends


@found.step
def grad_accumulation_normalization():
    norms = {}
    for way in (None, *sdk.GradAccNormalization):
        made["client"].forward_backward(batch(), "cross_entropy").result()
        norms[str(way.value if way else None)] = norm(
            made["client"], grad_accumulation_normalization=way
        )
    return {"norms": norms, "tokens": sum(len(row) for row in logprobs(made["client"]))}


@found.step
def save_state():
    client = made["client"]
    made["at_save"] = mean_logprob(client)
    path = client.save_state("kept").result().path
    step(client)
    made["moved"] = mean_logprob(client)
    return {"path": path, "names": client.list_checkpoints()}


@found.step
def load_state_with_optimizer():
    """Back, and the same step again leads to the same place."""
    client = made["client"]
    client.load_state_with_optimizer(client.resolve_checkpoint_path("kept")).result()
    back = mean_logprob(client)
    step(client)
    return {"back": back - made["at_save"], "again": mean_logprob(client) - made["moved"]}


@found.step
def load_state():
    """The weights come back without the optimizer's moments, so the same step leads elsewhere."""
    client = made["client"]
    client.load_state(client.resolve_checkpoint_path("kept")).result()
    back = mean_logprob(client)
    step(client)
    return {"back": back - made["at_save"], "again": mean_logprob(client) - made["moved"]}


@found.step
def load_state_of_nothing():
    made["client"].load_state_with_optimizer("nothing-like-it").result()


@found.step
def resolve_checkpoint_path():
    """A state of another job, which may be deleted by then."""
    made["client"].save_state("across").result()
    expected = mean_logprob(made["client"])
    source = made["job"]
    made["job"], made["service"], made["client"] = new_client()
    delete_job(source)
    path = made["client"].resolve_checkpoint_path("across", source_job_id=source)
    made["client"].load_state_with_optimizer(path).result()
    return {"path": path, "job": source, "loaded": mean_logprob(made["client"]) - expected}


@found.step
def create_training_client_lora():
    """An adapter begins as nothing: the base model's numbers, which its training then changes."""
    delete_job(made["job"])
    made["job"], made["service"], made["lora"] = new_client(lora_rank=4)
    before = mean_logprob(made["lora"])
    step(made["lora"])
    info = made["lora"].get_info()
    return {"before": before, "after": mean_logprob(made["lora"]), "rank": info.lora_rank}


@found.step
def create_base_training_client():
    """The frozen base on the trainer of an adapter, which trains on meanwhile."""
    base = made["service"].create_base_training_client(base_model=MODEL)
    first = mean_logprob(base)
    step(made["lora"])
    made["base"] = base
    return {"base": first, "still": mean_logprob(base), "policy": mean_logprob(made["lora"])}


@found.step
def forward_backward_on_the_base():
    made["base"].forward_backward(batch(), "cross_entropy").result()


@found.step
def save_weights_for_sampler_ext():
    first = made["lora"].save_weights_for_sampler_ext("adapter")
    return {"snapshot": first.snapshot_name, "path": first.path, "job": made["job"]}


@found.step
def forward_only():
    """A reference of its own."""
    delete_job(made["job"])
    job, _, client = new_client(forward_only=True)
    before = mean_logprob(client)
    made["reference"] = client
    return {"logprob": before, "mode": jobs.get(job)["trainerMode"]}


@found.step
def forward_backward_on_a_reference():
    made["reference"].forward_backward(batch(), "cross_entropy").result()


found.report()
