"""What the scripts of the `tinker` client share. Runs with every release from 0.15.0 on."""

from __future__ import annotations

import importlib.metadata
import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence

import tinker
import torch

BASE = "tiny"
RELEASE = tuple(int(part) for part in importlib.metadata.version("tinker").split("."))
ROWS = [list(b"homefire trains "), list(b"what you own"), list(b"5271 -> 1725")]

STILL = tinker.AdamParams(learning_rate=0.0)
"""Measures a gradient and moves no weight."""
LINEAR = tinker.AdamParams(learning_rate=1e5, eps=1e7, beta1=0.0, beta2=0.0)
"""With so large an eps, Adam's first step is 0.01 times the gradient."""

Pass = Callable[[tinker.TrainingClient], object]


def ints(values: Sequence) -> tinker.TensorData:
    tensor = torch.tensor(values, dtype=torch.int64)
    return tinker.TensorData(
        data=tensor.flatten().tolist(), dtype="int64", shape=list(tensor.shape)
    )


def floats(values: Sequence) -> tinker.TensorData:
    tensor = torch.tensor(values, dtype=torch.float32)
    return tinker.TensorData(
        data=tensor.flatten().tolist(), dtype="float32", shape=list(tensor.shape)
    )


def datum(row: list[int], *, weight: float = 1.0, **inputs: tinker.TensorData) -> tinker.Datum:
    """Predicts each token of the row from those before; the same weight for all."""
    length = len(row) - 1
    inputs = inputs or {"weights": floats([weight] * length)}
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints(row[:-1]),
        loss_fn_inputs={"target_tokens": ints(row[1:]), **inputs},
    )


DATA = [datum(row) for row in ROWS]


def adapter(service: tinker.ServiceClient, *, seed: int = 7, rank: int = 4, **more):
    return made(service.create_lora_training_client(BASE, rank=rank, seed=seed, **more))


def made(client):
    """From 0.38 on, what creates a client answers a future of it."""
    return client.result() if RELEASE >= (0, 38) else client


def trained_adapter(service: tinker.ServiceClient, *, seed: int = 7, steps: int = 1):
    """After a step both factors of the adapter have gradients."""
    client = adapter(service, seed=seed)
    for _ in range(steps):
        train(client)
    return client


def train(client, data=DATA, *, params=None, **adam) -> dict[str, float]:
    """One step of cross_entropy, submitted as one; the metrics of both halves."""
    params = params or tinker.AdamParams(**{"learning_rate": 1e-2, **adam})
    pending = client.forward_backward(data, "cross_entropy")
    step = client.optim_step(params)
    return {**pending.result().metrics, **step.result().metrics}


def cross_entropy(data) -> Pass:
    return lambda client: client.forward_backward(data, "cross_entropy")


def gradient_norm(client, *passes: Pass) -> float:
    """The norm of the gradient that these passes leave together; it is discarded."""
    for each in passes:
        each(client).result()
    return client.optim_step(STILL).result().metrics["grad_norm"]


def logprobs_of(output) -> list[list[float]]:
    return [list(each["logprobs"].data) for each in output.loss_fn_outputs]


def forward(client, data=DATA) -> list[list[float]]:
    return logprobs_of(client.forward(data, "cross_entropy").result())


class Refused(Exception):
    def __init__(self, status: int, body: dict) -> None:
        super().__init__(f"{status}: {body}")
        self.body = body


def post(name: str, **body: object) -> dict:
    """A request that this client has no method for."""
    request = urllib.request.Request(
        f"{os.environ['TINKER_BASE_URL']}/api/v1/{name}",
        data=json.dumps(body).encode(),
        headers={"X-API-Key": os.environ["TINKER_API_KEY"], "Content-Type": "application/json"},
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request) as response:
            return json.load(response)
    except urllib.error.HTTPError as exc:
        raise Refused(exc.code, json.load(exc)) from exc


def finish(client: tinker.TrainingClient) -> None:
    """Ends its session, as `ServiceClient.close` does; releases before 0.27 cannot say so."""
    session = client.model_id.partition(":")[0]
    post(f"sessions/{session}/finish", reason={"type": "success"}, detail="the script is done")
