"""Runs inside the real client's environment: the quoted example, block by block, in one namespace.

Only what the page leaves to its reader is filled in here: `compute_objective`, `build_batch`,
prompts, evaluation and counters. Between the blocks it measures what the page promises, and prints
the findings as one JSON line.

    python seed_script.py QUOTED_MARKDOWN
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import httpx
import tinker
import torch

FINDINGS: dict[str, object] = {}


def quoted_blocks(path: Path) -> dict[str, str]:
    found = re.findall(r"## (\w+)\n+```python\n(.*?)```", path.read_text(), re.DOTALL)
    return dict(found)


def compute_objective(*, data, logprobs_list):
    """Negative mean logprob of the targets: something that training visibly lowers."""
    return -torch.cat([logprobs.flatten() for logprobs in logprobs_list]).mean()


def build_batch(step: int) -> list[tinker.Datum]:
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
    FINDINGS.setdefault("completions", []).append(
        [[c.prompt_len, c.completion_len, len(c.full_tokens)] for c in completions]
    )
    return float(len(completions))


def mean_logprob(client) -> float:
    result = client.forward(build_batch(0), "cross_entropy").result()
    values = [v for out in result.loss_fn_outputs for v in out["logprobs"].data]
    return sum(values) / len(values)


def served_identity(names: dict) -> str | None:
    """What the deployment says that it serves, asked over plain HTTP."""
    status = names["deploy_mgr"].hotload_check_status(
        "research-serving", "accounts/fireworks/models/qwen3-8b"
    )
    return status["replicas"][0]["current_snapshot_identity"]


def completion_identity(names: dict) -> str:
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


def main(quoted: Path) -> None:
    blocks = quoted_blocks(quoted)
    set_up, evaluate = re.split(r"\n(?=if step % eval_interval)", blocks["sync"], maxsplit=1)
    names: dict = {
        "compute_objective": compute_objective,
        "build_batch": build_batch,
        "evaluate_responses": evaluate_responses,
        "eval_prompts": [{"role": "user", "content": "5271"}],
        "eval_interval": 1,
        "total_steps": 2,
    }
    exec(compile(blocks["bootstrap"], "bootstrap", "exec"), names)
    FINDINGS["job_id"] = names["created"].job_id
    FINDINGS["before"] = mean_logprob(names["training_client"])

    exec(compile(blocks["train"], "train", "exec"), names)
    exec(compile(set_up, "sync", "exec"), names)
    exec(compile(evaluate, "sync", "exec"), names)
    FINDINGS["first"] = [names["tracker"].base_identity, served_identity(names)]
    FINDINGS["first_completion"] = completion_identity(names)

    names["total_steps"] = 3
    exec(compile(blocks["train"], "train", "exec"), names)
    exec(compile(evaluate, "sync", "exec"), names)
    FINDINGS["second"] = [names["tracker"].base_identity, served_identity(names)]
    FINDINGS["second_completion"] = completion_identity(names)
    FINDINGS["trained"] = mean_logprob(names["training_client"])

    names["job_id"] = names["created"].job_id
    names["adam_params"] = tinker.AdamParams(learning_rate=1e-5)
    exec(compile(blocks["reconnect"], "reconnect", "exec"), names)
    FINDINGS["after_reconnect"] = mean_logprob(names["training_client"])
    print("FINDINGS " + json.dumps(FINDINGS), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
