"""Records what became of every cell of the compatibility matrix; see `cells.py` and `matrix.py`."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import pytest

from contract.cells import BadCell, Ledger, only_whole_modules

_LEDGER = pytest.StashKey[Ledger]()


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


def pytest_sessionfinish(session: pytest.Session) -> None:
    cells = session.config.getoption("--cells", None)  # absent in a run of all of tests/
    if cells is not None and only_whole_modules(session.config.args):
        session.config.stash[_LEDGER].write(cells)
