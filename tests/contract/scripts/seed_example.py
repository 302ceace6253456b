"""The quoted example of the public documentation, block by block, in one namespace.

Only what the page leaves to its reader is filled in here: `compute_objective`, `build_batch`,
prompts, evaluation and counters. Between the blocks it measures what the page promises.

    python seed_example.py QUOTED_MARKDOWN
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import httpx
import torch
from findings import Findings

found = Findings()
names: dict = {}
"""Of the quoted code: `tinker` is what it imports under that name."""


def quoted_blocks(path: Path) -> dict[str, str]:
    found = re.findall(r"## (\w+)\n+```python\n(.*?)```", path.read_text(), re.DOTALL)
    return dict(found)


def compute_objective(*, data, logprobs_list):
    """Negative mean logprob of the targets: something that training visibly lowers."""
    return -torch.cat([logprobs.flatten() for logprobs in logprobs_list]).mean()


def build_batch(step: int) -> list:
    tinker = names["tinker"]
    rows = [list(b"homefire trains "), list(b"what you own")]
    return [
        tinker.Datum(
            model_input=tinker.ModelInput.from_ints(row[:-1]),
            loss_fn_inputs={
                "target_tokens": tinker.TensorData(
                    data=row[1:], dtype="int64", shape=[len(row) - 1]
                )
            },
        )
        for row in rows
    ]


def evaluate_responses(completions) -> float:
    names["completions_seen"].append(
        [[c.prompt_len, c.completion_len, len(c.full_tokens)] for c in completions]
    )
    return float(len(completions))


def mean_logprob(client) -> float:
    result = client.forward(build_batch(0), "cross_entropy").result()
    values = [v for out in result.loss_fn_outputs for v in out["logprobs"].data]
    return sum(values) / len(values)


def served_identity() -> str | None:
    """What the deployment says that it serves, asked over plain HTTP."""
    status = names["deploy_mgr"].hotload_check_status(
        "research-serving", "accounts/fireworks/models/qwen3-8b"
    )
    return status["replicas"][0]["current_snapshot_identity"]


def completion_identity() -> str:
    response = httpx.post(
        f"{names['base_url']}/inference/v1/completions",
        headers={"Authorization": f"Bearer {names['api_key']}"},
        json={
            "model": "accounts/local/deployments/research-serving",
            "prompt": [1, 2],
            "max_tokens": 1,
        },
    )
    return response.raise_for_status().headers["x-homefire-weights"].split(";")[0]


def run(block: str, source: str) -> None:
    exec(compile(source, block, "exec"), names)


@found.step
def example():
    blocks = quoted_blocks(Path(sys.argv[1]))
    set_up, evaluate = re.split(r"\n(?=if step % eval_interval)", blocks["sync"], maxsplit=1)
    names.update(
        compute_objective=compute_objective,
        build_batch=build_batch,
        evaluate_responses=evaluate_responses,
        eval_prompts=[{"role": "user", "content": "5271"}],
        eval_interval=1,
        total_steps=2,
        completions_seen=[],
    )
    measured: dict[str, object] = {}
    run("bootstrap", blocks["bootstrap"])
    measured["job_id"] = names["created"].job_id
    measured["before"] = mean_logprob(names["training_client"])

    run("train", blocks["train"])
    run("sync", set_up)
    run("sync", evaluate)
    measured["first"] = [names["tracker"].base_identity, served_identity()]
    measured["first_completion"] = completion_identity()

    names["total_steps"] = 3
    run("train", blocks["train"])
    run("sync", evaluate)
    measured["second"] = [names["tracker"].base_identity, served_identity()]
    measured["second_completion"] = completion_identity()
    measured["trained"] = mean_logprob(names["training_client"])

    names["job_id"] = names["created"].job_id
    names["adam_params"] = names["tinker"].AdamParams(learning_rate=1e-5)
    run("reconnect", blocks["reconnect"])
    measured["after_reconnect"] = mean_logprob(names["training_client"])
    return {**measured, "completions": names["completions_seen"]}


found.report()
