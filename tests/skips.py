"""A plugin: a skip that `tests/skips.txt` does not list fails the run."""

from __future__ import annotations

from pathlib import Path

import pytest

LIST = Path(__file__).parent / "skips.txt"


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Skips())


class _Skips:
    def __init__(self) -> None:
        lines = LIST.read_text().splitlines()
        self._listed = {line.partition("#")[0].strip() for line in lines} - {""}
        self._unlisted: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._note(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._note(report)

    def _note(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.skipped and report.nodeid not in self._listed:
            self._unlisted.append(report.nodeid)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        clean = (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
        if self._unlisted and session.exitstatus in clean:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for nodeid in self._unlisted:
            terminalreporter.write_line(f"{nodeid} was skipped: not in tests/skips.txt", red=True)
