"""What the contract tests of fireworks-ai share."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest

from contract.cells import newest, versions
from contract.clients import ClientFindings, run_client
from contract.environments import ENVIRONMENTS

CLIENT = "fireworks-ai"
HOSTED_MODEL = "accounts/fireworks/models/qwen3-8b"
FindingsOf = Callable[[str], ClientFindings]


def since(version: str) -> pytest.MarkDecorator:
    """The test runs with that release and every later one; in the core set with the newest alone."""
    return pytest.mark.parametrize("version", newest(CLIENT, since=version))


every_release = since("1.0.0a52")
every_core_release = pytest.mark.parametrize("version", versions(CLIENT))
"""Every release, with all that are in the core set there."""


def shows(method: str, *, refused: str | None = None) -> pytest.MarkDecorator:
    """The cell of `method`; with `refused`, that it ends with this error."""
    outcome = "works" if refused is None else f"refused: {refused}"
    return pytest.mark.cell(client=CLIENT, method=method, outcome=outcome)


def findings_of(
    homefire_up: Callable[..., object], script: str, *arguments: object, engine: str = "fake"
) -> FindingsOf:
    """Runs the script once with each release that is asked for, each on a server of its own."""

    @functools.cache
    def of(version: str) -> ClientFindings:
        server = homefire_up(engine=engine, arguments=["--alias", f"{HOSTED_MODEL}=tiny"])
        try:
            return run_client(ENVIRONMENTS[CLIENT, version], script, server, *arguments)
        finally:
            server.stop()

    return of
