"""Weights that change while completions run: the deployment's transition types."""

from __future__ import annotations

import asyncio
import json
import threading

import httpx
from findings import Findings
from fireworks_plane import (
    KEY,
    MODEL,
    PACE_S,
    URL,
    deployments,
    jobs,
    sdk,
    service_of,
    step,
)

found = Findings()
NAME = "swapping"
RESOURCE = f"accounts/local/deployments/{NAME}"
made: dict = {}


def body(**fields) -> dict:
    return {"model": RESOURCE, "prompt": [1, 2], "ignore_eos": True, **fields}


def complete() -> httpx.Response:
    return httpx.post(
        f"{URL}/inference/v1/completions",
        headers={"X-Api-Key": KEY},
        json=body(max_tokens=1),
        timeout=120.0,
        trust_env=False,
    )


def weights(response: httpx.Response) -> str:
    return response.raise_for_status().headers["x-homefire-weights"].split(";")[0]


class LongCompletion(threading.Thread):
    """Streams until the new weights are wanted and then some."""

    def __init__(self) -> None:
        super().__init__()
        self.runs = threading.Event()
        self.weights = ""
        self.chunks = 0
        self.models: list[str] = []
        self.spans: list = []
        self.start()
        self.runs.wait(60.0)

    def run(self) -> None:
        with httpx.stream(
            "POST",
            f"{URL}/inference/v1/completions",
            headers={"X-Api-Key": KEY},
            json=body(max_tokens=800, stream=True),
            timeout=120.0,
            trust_env=False,
        ) as response:
            self.weights = weights(response)
            for line in response.iter_lines():
                self.runs.set()
                if line.startswith("data: {"):
                    self.take(json.loads(line.removeprefix("data: ")))

    def take(self, chunk: dict) -> None:
        self.chunks += 1
        identity = chunk["model"].rpartition("@")[2]
        if identity not in self.models:
            self.models.append(identity)
        self.spans = chunk.get("homefire", {}).get("spans", self.spans)


def swap_under(transition: str, name: str, sample) -> dict:
    """New weights are loaded while a long completion runs; `sample` is called until they serve."""
    deployments.update(
        NAME, body={"hotLoadTransitionType": transition}, update_mask="hot_load_transition_type"
    )
    before = weights(complete())
    step(made["client"])
    saved = made["client"].save_weights_for_sampler_ext(name).snapshot_name
    long = LongCompletion()
    deployments.hotload(NAME, MODEL, saved)
    seen = sample(saved)
    long.join()
    return {
        "before": before,
        "saved": saved,
        "long": long.weights,
        "models": long.models,
        "spans": [[span["identity"] for span in choice] for choice in long.spans],
        "streamed": long.chunks > 1,
        "seen": seen,
    }


@found.step
def set_up():
    created = jobs.create(sdk.TrainerJobConfig(base_model=MODEL))
    deployments.create_or_get(
        sdk.DeploymentConfig(
            deployment_id=NAME, base_model=MODEL, hot_load_trainer_job=created.job_name
        )
    )
    endpoint = jobs.wait_for_ready(created.job_id, poll_interval_s=PACE_S)
    made["client"] = service_of(endpoint).create_training_client(base_model=MODEL, lora_rank=0)
    deployments.wait_for_ready(NAME, poll_interval_s=PACE_S)
    made["sampler"] = sdk.DeploymentSampler(
        inference_url=deployments.inference_url, model=RESOURCE, api_key=KEY
    )


@found.step
def sync():
    """New requests are refused with 425 until the swap; what ran ends on the old weights."""

    def sample(saved: str) -> list:
        statuses = []
        while True:
            answer = complete()
            statuses.append(answer.status_code)
            if answer.status_code == 425:
                made["refusal"] = answer.json()["error"]["code"]
            elif weights(answer) == saved:
                return sorted(set(statuses))

    return {**swap_under("SYNC", "first", sample), "code": made.get("refusal")}


@found.step
def sync_with_the_sampler():
    """The SDK's sampler asks again by itself until it is answered, by the new weights."""

    def sample(saved: str) -> dict:
        first = complete()
        while first.status_code != 425 and weights(first) != saved:
            first = complete()
        answer, _ = asyncio.run(
            made["sampler"].async_completions_stream(
                prompt=[1, 2],
                max_tokens=1,
                raw_output=True,
                hotload_retry_interval=0.1,
                hotload_max_retries=1000,
            )
        )
        return {
            "refused_first": first.status_code == 425,
            "tokens": len(answer["choices"][0]["raw_output"]["completion_token_ids"]),
            "then": weights(complete()) == saved,
        }

    return swap_under("SYNC", "second", sample)


@found.step
def asynchronous():
    """What runs goes on in place, each chunk with the name of its weights, and nothing is refused."""

    def sample(saved: str) -> list:
        statuses = []
        while True:
            answer = complete()
            statuses.append(answer.status_code)
            if weights(answer) == saved:
                return sorted(set(statuses))

    return swap_under("ASYNC", "third", sample)


found.report()
