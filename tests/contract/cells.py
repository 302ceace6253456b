"""Cells of the compatibility matrix: what a test claims about a client's method.

    @pytest.mark.cell(client="tinker", method="optim_step")
    @pytest.mark.cell(client="tinker", method="images", outcome="refused: unsupported")

A test parametrized by `version` speaks for that version; any other names it in the mark. Where
several tests claim one cell, it holds when all of them pass.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

from contract.environments import ENVIRONMENTS
from homefire.wire.errors import ERRORS_BY_CODE

WORKS = "works"
_REFUSED = re.compile(r"refused: (\w+)")

CORE = {
    ("tinker", "0.16.1"),
    ("tinker", "0.38.0"),
    ("fireworks-ai", "1.2.0a68"),
    ("fireworks-ai", "1.2.30"),
    ("openai", "3.57.0"),
    ("lm-eval", "0.4.13"),
}
"""What `make test` runs; the rest is marked `clients`."""


class BadCell(ValueError):
    """A mark that names no client environment, or an outcome that cannot be."""


@dataclass(frozen=True, order=True)
class Cell:
    client: str
    version: str
    method: str
    outcome: str = WORKS
    """`works`, or `refused: <code>` of `homefire.wire.errors`."""

    def __post_init__(self) -> None:
        if (self.client, self.version) not in ENVIRONMENTS:
            raise BadCell(f"{self}: there is no environment of {self.client} {self.version}")
        refused = _REFUSED.fullmatch(self.outcome)
        if self.outcome != WORKS and (refused is None or refused.group(1) not in ERRORS_BY_CODE):
            raise BadCell(f"{self}: the outcome is neither 'works' nor 'refused: <error code>'")


def cells_of(item: pytest.Item) -> Iterator[Cell]:
    for mark in item.iter_markers("cell"):
        named = dict(mark.kwargs)
        if "version" not in named:
            parameters = getattr(getattr(item, "callspec", None), "params", {})
            named["version"] = parameters.get("version")
        yield Cell(**named)


def versions(client: str, *, since: str = "", until: str = "") -> list[Any]:
    """Values for `parametrize("version", …)`, in the order of the table, both ends included."""
    every = [version for name, version in ENVIRONMENTS if name == client]
    first = every.index(since) if since else 0
    last = every.index(until) if until else len(every) - 1
    return [
        pytest.param(version, marks=() if (client, version) in CORE else pytest.mark.clients)
        for version in every[first : last + 1]
    ]


def newest(client: str, *, since: str = "") -> list[Any]:
    """The same, with the newest release alone in the core set: where each costs half a minute."""
    releases = [param.values[0] for param in versions(client, since=since)]
    older = [pytest.param(release, marks=pytest.mark.clients) for release in releases[:-1]]
    return [*older, pytest.param(releases[-1])]


class Ledger:
    """The cells of a run, each with the tests that claim it and what became of them."""

    def __init__(self) -> None:
        self.tests: dict[str, dict[Cell, dict[str, str]]] = {}
        """By test module; a test that was collected and did not run is `deselected`."""

    def collect(self, item: pytest.Item) -> None:
        for cell in cells_of(item):
            cells = self.tests.setdefault(item.path.stem, {})
            cells.setdefault(cell, {})[item.name] = "deselected"

    def judge(self, item: pytest.Item, report: pytest.TestReport) -> None:
        """Passing takes a passed call; a failure of set-up or tear-down stays."""
        if report.passed and report.when != "call":
            return
        for cell in cells_of(item):
            tests = self.tests[item.path.stem][cell]
            if tests[item.name] in ("deselected", "passed"):
                tests[item.name] = report.outcome

    def merge(self, other: Ledger) -> None:
        """Of another worker, which collected the same tests and ran others of them."""
        for module, cells in other.tests.items():
            for cell, outcomes in cells.items():
                mine = self.tests.setdefault(module, {}).setdefault(cell, {})
                ran = {test: o for test, o in outcomes.items() if o != "deselected"}
                mine.update({**outcomes, **mine, **ran})

    def dump(self) -> str:
        content = {
            module: [{**asdict(cell), "tests": tests} for cell, tests in sorted(cells.items())]
            for module, cells in sorted(self.tests.items())
        }
        return json.dumps(content, indent=1) + "\n"

    @classmethod
    def load(cls, dumped: str) -> Ledger:
        ledger = cls()
        for module, rows in json.loads(dumped).items():
            for row in rows:
                tests = row.pop("tests")
                ledger.tests.setdefault(module, {})[Cell(**row)] = tests
        return ledger

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.dump())

    @classmethod
    def read(cls, path: Path) -> Ledger:
        return cls.load(path.read_text())


def only_whole_modules(arguments: Sequence[str]) -> bool:
    """Whether these arguments of pytest name no single test, which would hide a cell's others."""
    return not any("::" in argument for argument in arguments)
