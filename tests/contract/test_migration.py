"""The snippets of the README's "Migrate" section, run by the real clients as they stand."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from contract.environments import ENVIRONMENTS, ClientEnvironment
from homefire.sdk import DeploymentConfig, DeploymentManager

README = Path(__file__).parents[2] / "README.md"
DOCUMENTED_URL = "http://127.0.0.1:8700"
DEPLOYMENT = "accounts/local/deployments/serving"


@pytest.fixture(scope="module")
def server(homefire_up):
    return homefire_up()


def snippet(first_line: str) -> str:
    """The one code block of the README that begins with this line."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    (found,) = [block for block in blocks if block.startswith(first_line)]
    return found


def run_snippet(environment: ClientEnvironment, server, code: str, **names: str) -> list[str]:
    """What it printed. Only the port of the URL is another, since tests share the machine."""
    assert DOCUMENTED_URL in code
    given = {"api_key": server.api_key, **names}
    head = "".join(f"{name} = {value!r}\n" for name, value in given.items())
    run = subprocess.run(
        [environment.python(), "-c", head + code.replace(DOCUMENTED_URL, server.url)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TINKER_TELEMETRY": "0"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    return run.stdout.split("\n")


@pytest.mark.cell(client="fireworks-ai", version="1.2.0a68", method="README: migrate")
def test_a_fireworks_script_gets_a_trainer_of_this_machine(server):
    code = snippet("from fireworks.training.sdk import")
    printed = run_snippet(ENVIRONMENTS["fireworks-ai", "1.2.0a68"], server, code)
    job, base_url = printed[0].split()
    assert base_url == f"{server.url}/training/v1/rlorTrainerJobs/local/{job}"
    (row,) = [line for line in server.cli("trainer", "list").stdout.splitlines() if job in line]
    assert "RUNNING" in row


@pytest.mark.cell(client="tinker", version="0.38.0", method="README: migrate")
def test_a_tinker_script_samples_what_it_trained(server):
    """One step at this rate makes the trained continuation the likeliest one."""
    code = snippet("import tinker\n\nservice")
    printed = run_snippet(ENVIRONMENTS["tinker", "0.38.0"], server, code)
    assert printed[0].startswith("[3")


@pytest.mark.cell(client="openai", version="3.57.0", method="README: migrate")
def test_an_openai_script_is_answered_by_a_deployment(server):
    manager = DeploymentManager(api_key=server.api_key, base_url=server.url)
    manager.create_or_get(DeploymentConfig("serving", "tiny"))
    manager.wait_for_ready("serving")
    code = snippet("from openai import OpenAI")
    printed = run_snippet(ENVIRONMENTS["openai", "3.57.0"], server, code, deployment=DEPLOYMENT)
    assert printed[0].startswith("tiny@base ")
