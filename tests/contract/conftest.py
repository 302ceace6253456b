"""Records what became of every cell of the compatibility matrix (see `cells.py` and `matrix.py`), and
runs the scripts of the `tinker` client."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Protocol

import pytest

from conftest import RunningHomefire, StartHomefire
from contract.cells import BadCell, Ledger, only_whole_modules
from contract.clients import ClientFindings, run_client
from contract.environments import ENVIRONMENTS

_LEDGER = pytest.StashKey[Ledger]()
_SHARE = "homefire_cells"


class WorkerNode(Protocol):
    """What the controller of pytest-xdist knows of a worker that has ended."""

    config: pytest.Config
    workeroutput: dict[str, str]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--cells",
        type=Path,
        default=Path(__file__).parents[2] / "build/contract/cells.json",
        help="where the cells of this run, and what became of their tests, are written",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_LEDGER] = Ledger()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Before a mark expression deselects anything."""
    for item in items:
        try:
            config.stash[_LEDGER].collect(item)
        except BadCell as exc:
            raise pytest.UsageError(f"{item.nodeid}: {exc}") from exc


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    item.config.stash[_LEDGER].judge(item, report)
    return report


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: WorkerNode) -> None:
    """Each worker of pytest-xdist collects everything and runs its share of it."""
    node.config.stash[_LEDGER].merge(Ledger.load(node.workeroutput.get(_SHARE, "{}")))


def pytest_sessionfinish(session: pytest.Session) -> None:
    ledger = session.config.stash[_LEDGER]
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput[_SHARE] = ledger.dump()
        return
    cells = session.config.getoption("--cells", None)  # absent in a run of all of tests/
    if cells is not None and only_whole_modules(session.config.args):
        ledger.write(cells)


@pytest.fixture(scope="session")
def tinker_root(shared_homefire_up: StartHomefire) -> RunningHomefire:
    """One server for all tests of the `tinker` client at the root."""
    return shared_homefire_up()


class ScriptRuns:
    """Each script once for each release; what it found, or how it failed, is kept."""

    def __init__(self, server: RunningHomefire) -> None:
        self._server = server
        self._outcomes: dict[tuple[str, str], ClientFindings | BaseException] = {}

    def __call__(self, version: str, script: str) -> ClientFindings:
        key = version, script
        if key not in self._outcomes:
            self._outcomes[key] = self._run(version, script)
        outcome = self._outcomes[key]
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def _run(self, version: str, script: str) -> ClientFindings | BaseException:
        try:
            return run_client(
                ENVIRONMENTS["tinker", version], script, self._server, timeout_s=280.0
            )
        except pytest.fail.Exception as exc:
            return exc


@pytest.fixture(scope="session")
def run_tinker(tinker_root: RunningHomefire) -> ScriptRuns:
    """`run_tinker("0.38.0", "tinker_training.py")["custom_loss"]` is what that step found."""
    return ScriptRuns(tinker_root)
