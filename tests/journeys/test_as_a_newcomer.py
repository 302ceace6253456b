"""The commands of the README, as somebody types them for the first time."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tinker
import torch
from transformers import AutoTokenizer

from homefire.checkpoints.tiny import ensure_tiny

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def run(command: str, *, timeout_s: float = 600, **environment: str) -> str:
    """A line of shell with the project's commands on the path; its standard output."""
    env = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", **environment}
    done = subprocess.run(
        ["bash", "-c", command],
        env=env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory) -> tuple[str, Path]:
    out = tmp_path_factory.mktemp("quickstart")
    home = tmp_path_factory.mktemp("user")
    return run(f"homefire quickstart --out {out}", HOME=str(home)), out


def test_the_quickstart_learns_through_the_deployment(quickstart):
    output, _ = quickstart
    last = output.strip().splitlines()[-1]
    found = re.fullmatch(r"held-out reward ([\d.]+) -> ([\d.]+) over (\d+) prompts", last)
    assert found, last
    before, after, prompts = float(found[1]), float(found[2]), int(found[3])
    assert prompts >= 200
    assert 0.25 <= before <= 0.5
    assert after - before >= 0.2


def test_the_quickstart_syncs_a_base_and_then_deltas(quickstart):
    output, _ = quickstart
    kinds = re.findall(r"step_\d+\s+(base|delta)\s+\d+", output)
    assert kinds[0] == "base"
    assert set(kinds[1:]) == {"delta"}
    assert len(kinds) >= 20


def test_the_quickstart_leaves_its_records(quickstart):
    _, out = quickstart
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(metrics) >= 20
    evaluations = [
        json.loads(line) for line in (out / "evaluations.jsonl").read_text().splitlines()
    ]
    assert len(evaluations) == 2
    assert len({json.dumps(e) for e in evaluations}) == 2
    assert (out / "held_out.json").exists()
    assert (out / "reward.png").read_bytes().startswith(b"\x89PNG")


def test_the_example_runs_in_a_shell_that_evaluated_homefire_env(homefire_up):
    server = homefire_up()
    output = run(
        f'eval "$(homefire env --home {server.home})" && python examples/lifecycle.py',
        OMP_NUM_THREADS="1",
    )
    scores = [float(score) for score in re.findall(r"'eval_score': ([\d.]+)", output)]
    assert "Reconnected to" in output
    assert len(scores) == 4
    assert scores[-1] > 0.5


def test_the_loop_of_the_readme_runs_as_it_stands(homefire_up, monkeypatch, tmp_path):
    server = homefire_up()
    monkeypatch.setenv("FIREWORKS_BASE_URL", server.url)
    monkeypatch.setenv("FIREWORKS_API_KEY", server.api_key)
    (block,) = re.findall(
        r"```python\n(import asyncio.*?)```", (ROOT / "README.md").read_text(), re.S
    )
    seen: list[str] = []

    def build_batch(samples) -> list[tinker.Datum]:
        seen.extend(sample.weights.identity for sample in samples)
        rows = [sample.full_tokens for sample in samples]
        return [
            tinker.Datum(
                tinker.ModelInput.from_ints(row[:-1]), {"target_tokens": torch.tensor(row[1:])}
            )
            for row in rows
        ]

    def objective(data, logprobs_list):
        loss = -torch.cat(logprobs_list).mean()
        return loss, {"loss": loss.item()}

    names = {
        "steps": 2,
        "messages": [{"role": "user", "content": "5271"}],
        "tokenizer": AutoTokenizer.from_pretrained(ensure_tiny(tmp_path / "tiny")),
        "build_batch": build_batch,
        "objective": objective,
    }
    exec(compile(block, "README.md", "exec"), names)
    assert len(seen) == 32
    assert len(set(seen)) == 2
