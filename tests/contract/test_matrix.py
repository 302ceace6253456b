"""The matrix itself: what is taken from a run, what is not, and what the page says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from contract.cells import BadCell, Cell, Ledger, only_whole_modules, versions
from contract.matrix import ModuleResults, NotShown, page, taken

TESTS = Path(__file__).parents[1]
SUITE = """
import pytest

def cell(method, **more):
    return pytest.mark.cell(client="tinker", method=method, **more)

@cell("passes")
@pytest.mark.parametrize("version", ["0.16.1", "0.38.0"])
def test_passes(version): pass

@cell("refuses", version="0.38.0", outcome="refused: unsupported")
def test_refuses(): pass

@cell("half", version="0.38.0")
def test_one_half(): pass

@cell("half", version="0.38.0")
def test_other_half(): assert BROKEN != "call"

@pytest.fixture
def breaks_after():
    yield
    assert BROKEN != "teardown"

@cell("torn", version="0.38.0")
def test_torn_down(breaks_after): pass

@cell("skipped", version="0.38.0")
def test_skipped():
    if BROKEN == "skip":
        pytest.skip("by plan")
"""


@pytest.fixture
def run(tmp_path):
    """Runs the suite above, broken in one way, under the real plugin; its ledger."""

    def run(broken: str = "", *arguments: str) -> Ledger:
        (tmp_path / "test_suite.py").write_text(f"BROKEN = {broken!r}\n{SUITE}")
        cells = tmp_path / "cells.json"
        command = [sys.executable, "-m", "pytest", "-p", "contract.conftest", "-q"]
        command += ["-p", "no:cacheprovider", f"--cells={cells}", *arguments, str(tmp_path)]
        environment = {**os.environ, "PYTHONPATH": str(TESTS)}
        subprocess.run(command, env=environment, cwd=tmp_path, check=False, capture_output=True)
        return Ledger.read(cells)

    return run


def tinker(method: str, version: str = "0.38.0", outcome: str = "works") -> Cell:
    return Cell("tinker", version, method, outcome)


EVERY = {
    tinker("passes", "0.16.1"),
    tinker("passes"),
    tinker("refuses", outcome="refused: unsupported"),
    tinker("half"),
    tinker("torn"),
    tinker("skipped"),
}


def test_a_whole_green_run_is_taken_as_it_claims(run):
    assert taken(run(), {}, date="2026-11-24") == {
        "test_suite": ModuleResults("2026-11-24", frozenset(EVERY))
    }


@pytest.mark.parametrize(
    ("broken", "method"), [("call", "half"), ("teardown", "torn"), ("skip", "skipped")]
)
def test_a_cell_with_one_test_that_did_not_pass_stops_the_update(run, broken, method):
    with pytest.raises(NotShown, match=f"method='{method}'") as raised:
        taken(run(broken), {}, date="2026-11-24")
    assert str(raised.value).count("Cell(") == 1


def test_a_deselected_test_shows_nothing_and_its_cell_keeps_what_it_had(run):
    earlier = {
        "test_suite": ModuleResults("2026-11-01", frozenset({tinker("half"), tinker("gone")}))
    }
    updated = taken(run("", "-k", "not other_half and not torn"), earlier, date="2026-11-24")
    assert updated["test_suite"].cells == EVERY - {tinker("torn")}


def test_two_workers_record_what_one_process_does(run):
    """Dealt test by test, so that the two halves of a cell may run in different workers."""
    assert run("call", "-n", "2", "--dist", "load").tests == run("call").tests


def test_a_run_of_single_tests_is_not_recorded():
    assert only_whole_modules(["tests/contract", "tests/contract/test_openai.py"])
    assert not only_whole_modules(["tests/contract/test_openai.py::test_usage"])


@pytest.mark.parametrize(
    "cell",
    [
        {"client": "tinker", "version": "9.9.9", "method": "m"},
        {"client": "tinker", "version": "0.38.0", "method": "m", "outcome": "refused"},
        {
            "client": "tinker",
            "version": "0.38.0",
            "method": "m",
            "outcome": "refused: no_such_code",
        },
        {"client": "tinker", "version": "0.38.0", "method": "m", "outcome": "fails"},
    ],
)
def test_a_cell_names_an_environment_and_an_outcome_that_exists(cell):
    with pytest.raises(BadCell):
        Cell(**cell)


def test_the_page_has_a_row_for_each_method_and_a_column_for_each_version():
    cells = {tinker("forward", "0.15.0"), tinker("images", outcome="refused: unsupported")}
    lines = page({"test_x": ModuleResults("2026-11-24", frozenset(cells))}).splitlines()
    assert "results of 2026-11-24. Do not edit." in lines
    assert "| method | 0.15.0 | 0.16.1 | 0.22.7 | 0.26.2 | 0.30.0 | 0.38.0 |" in lines
    assert "| forward | works | – | – | – | – | – |" in lines
    assert "| images | – | – | – | – | – | refused: `unsupported` |" in lines


def test_the_page_says_how_old_its_results_are():
    dated = {
        f"test_{day}": ModuleResults(f"2026-11-{day}", frozenset({tinker("forward")}))
        for day in (21, 24, 22)
    }
    assert "results of 2026-11-21 to 2026-11-24. Do not edit." in page(dated)


def test_versions_outside_the_core_are_for_make_test_clients():
    named = {each.values[0]: {m.name for m in each.marks} for each in versions("tinker")}
    assert named["0.38.0"] == named["0.16.1"] == set()
    assert named["0.15.0"] == named["0.30.0"] == {"clients"}


def test_versions_are_cut_on_both_sides():
    cut = versions("tinker", since="0.22.7", until="0.30.0")
    assert [each.values[0] for each in cut] == ["0.22.7", "0.26.2", "0.30.0"]
