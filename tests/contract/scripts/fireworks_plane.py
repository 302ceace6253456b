"""What the scripts of the Fireworks SDK share: its managers, and the tinker that it works with."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import httpx
from fireworks.training import sdk

if hasattr(sdk, "AdamParams"):  # from 1.2.25 on it brings its own
    tinker = sdk
else:
    import tinker

URL = os.environ["FIREWORKS_BASE_URL"]
KEY = os.environ["FIREWORKS_API_KEY"]
MODEL = "accounts/fireworks/models/qwen3-8b"
PACE_S = 0.2

jobs = sdk.TrainerJobManager(api_key=KEY, base_url=URL)
deployments = sdk.DeploymentManager(api_key=KEY, base_url=URL)


def rest(method: str, path: str, body: object = None) -> dict:
    """A call that this release of the SDK has no method for."""
    answer = httpx.request(
        method,
        f"{URL}{path}",
        json=body,
        headers={"X-Api-Key": KEY},
        timeout=60.0,
        trust_env=False,
    )
    return answer.raise_for_status().json()


def job_path(job_id: str) -> str:
    return f"/v1/accounts/{jobs.account_id}/rlorTrainerJobs/{job_id}"


def deployment_path(deployment_id: str) -> str:
    return f"/v1/accounts/{jobs.account_id}/deployments/{deployment_id}"


def until(holds: Callable[[], bool], *, timeout_s: float = 60.0) -> None:
    """What the server does in the background and the SDK has no wait for."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError("it did not come about")
        time.sleep(PACE_S)


def cancel(job_id: str) -> None:
    rest("POST", f"{job_path(job_id)}:cancel")
    until(lambda: jobs.get(job_id)["state"] == "JOB_STATE_CANCELLED")


def delete_job(job_id: str) -> None:
    jobs.delete(job_id)
    until(lambda: jobs.get(job_id)["state"] == "JOB_STATE_DELETED")


def delete_deployment(deployment_id: str) -> None:
    deployments.delete(deployment_id)
    until(lambda: deployments.get(deployment_id) is None)


def service_of(endpoint: object) -> object:
    return sdk.FiretitanServiceClient(base_url=endpoint.base_url, api_key=KEY)


def datum(text: str, *, weights: list[float] | None = None) -> object:
    """Next-token prediction of `text`, one byte a token."""
    row = list(text.encode())
    given = {"target_tokens": tinker.TensorData(data=row[1:], dtype="int64", shape=[len(row) - 1])}
    if weights is not None:
        given["weights"] = tinker.TensorData(data=weights, dtype="float32", shape=[len(weights)])
    return tinker.Datum(model_input=tinker.ModelInput.from_ints(row[:-1]), loss_fn_inputs=given)


ROWS = ["homefire trains ", "what you own"]


def batch() -> list:
    return [datum(text) for text in ROWS]


def logprobs(client: object, data: list | None = None) -> list[list[float]]:
    result = client.forward(data or batch(), "cross_entropy").result()
    return [list(output["logprobs"].data) for output in result.loss_fn_outputs]


def mean_logprob(client: object) -> float:
    values = [value for row in logprobs(client) for value in row]
    return sum(values) / len(values)


def step(client: object, *, learning_rate: float = 1e-2, **options: object) -> dict:
    """One step towards `ROWS`; the metrics of its optimizer step."""
    client.forward_backward(batch(), "cross_entropy").result()
    adam = tinker.AdamParams(learning_rate=learning_rate, beta1=0.9, beta2=0.95, eps=1e-8)
    return dict(client.optim_step(adam, **options).result().metrics or {})
