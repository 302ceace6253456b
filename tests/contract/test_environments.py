"""The clients' environments hold what they say, over the project's own."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass

import pytest

from contract import environments
from contract.cells import CORE
from contract.clients import run_client
from contract.environments import ENVIRONMENTS, ClientEnvironment, EnvironmentUnavailable


@dataclass(frozen=True)
class NoServer:
    url: str = "http://127.0.0.1:9"
    api_key: str = "tml-none"


@pytest.mark.parametrize(
    "environment",
    [
        pytest.param(each, id=each.name, marks=() if key in CORE else pytest.mark.clients)
        for key, each in ENVIRONMENTS.items()
    ],
)
def test_an_environment_holds_the_release_of_its_client(environment):
    findings = run_client(environment, "release.py", NoServer(), environment.client)
    assert findings["release"] == environment.version
    assert findings["project"] == importlib.metadata.version("transformers")


def test_a_wheel_that_cannot_be_had_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(environments, "DIRECTORY", tmp_path)
    absent = ClientEnvironment("tinker", "0.38.0", (str(tmp_path / "absent-1.0-py3-none-any.whl"),))
    with pytest.raises(EnvironmentUnavailable, match=r"tinker-0\.38\.0 .*absent-1\.0"):
        absent.python()
