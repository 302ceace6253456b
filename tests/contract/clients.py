"""Runs a client's script in the client's own environment against a running homefire."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import pytest

from contract.environments import ClientEnvironment
from contract.scripts.findings import MARK

SCRIPTS = Path(__file__).parent / "scripts"


class Server(Protocol):
    """What a client is told; `RunningHomefire` of `tests/conftest.py` is one."""

    @property
    def url(self) -> str: ...

    @property
    def api_key(self) -> str: ...


class ClientFindings:
    """The findings of one run of a script, by the name of the step."""

    def __init__(self, steps: Mapping[str, Mapping[str, Any]], stderr: str):
        self._steps = steps
        self.stderr = stderr

    def __getitem__(self, step: str) -> Any:
        """What the step returned; the test fails with the client's traceback where it raised."""
        found = self._step(step)
        if "error" in found:
            pytest.fail(f"{step} failed in the client:\n{found['error']['traceback']}")
        return found["value"]

    def refusal(self, step: str) -> str:
        """The code of homefire's error that the step ended with; see `error` for the rest."""
        error = self.error(step)
        if error["code"] is None:
            pytest.fail(f"{step} failed, and not with an error of homefire:\n{error['traceback']}")
        return error["code"]

    def error(self, step: str) -> dict[str, Any]:
        """`type`, `message`, `code` and `traceback` of what the step raised."""
        found = self._step(step)
        if "error" not in found:
            pytest.fail(f"{step} was expected to fail and returned {found['value']!r}")
        return found["error"]

    def _step(self, step: str) -> Mapping[str, Any]:
        if step not in self._steps:
            pytest.fail(f"the script has no step {step!r}; it ran {', '.join(self._steps)}")
        return self._steps[step]


def run_client(
    environment: ClientEnvironment,
    script: str,
    server: Server,
    *arguments: str | Path,
    env: Mapping[str, str] | None = None,
    timeout_s: float = 300.0,
) -> ClientFindings:
    """`script` is a file of `tests/contract/scripts` that ends with `Findings.report()`."""
    command = [environment.python(), SCRIPTS / script, *arguments]
    try:
        run = subprocess.run(
            command,
            env={**client_environ(server), **(env or {})},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as exc:
        pytest.fail(
            f"{script} with {environment.name} took over {timeout_s} s\n"
            f"{_tail(_text(exc.stdout))}\n{_tail(_text(exc.stderr))}"
        )
    lines = [line for line in run.stdout.splitlines() if line.startswith(MARK)]
    if run.returncode != 0 or not lines:
        pytest.fail(
            f"{script} with {environment.name} ended with status {run.returncode}\n"
            f"{_tail(run.stdout)}\n{_tail(run.stderr)}"
        )
    return ClientFindings(json.loads(lines[-1].removeprefix(MARK)), run.stderr)


def client_environ(server: Server) -> dict[str, str]:
    """A URL and a key for every client, and nothing else that is not the user's already."""
    return {
        **os.environ,
        "FIREWORKS_BASE_URL": server.url,
        "FIREWORKS_API_KEY": server.api_key,
        "TINKER_BASE_URL": server.url,
        "TINKER_API_KEY": server.api_key,
        "OPENAI_BASE_URL": f"{server.url}/v1",
        "OPENAI_API_KEY": server.api_key,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }


def _text(output: bytes | str | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


def _tail(text: str) -> str:
    return text[-6000:]
