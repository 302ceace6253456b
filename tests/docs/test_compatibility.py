"""docs/compatibility.md says what the recorded results say, and they what the tests claim."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from contract.cells import Ledger
from contract.matrix import PAGE, page, recorded

ROOT = Path(__file__).parents[2]
REMEDY = "run the tests and `python tests/contract/matrix.py --update`, or `make test-clients`"


@pytest.fixture(scope="module")
def claimed(tmp_path_factory) -> dict[str, set]:
    """The cells of every contract test, by module, without running any."""
    cells = tmp_path_factory.mktemp("cells") / "cells.json"
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", f"--cells={cells}"]
    run = subprocess.run(
        [*command, "tests/contract"],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return {module: set(tests) for module, tests in Ledger.read(cells).tests.items()}


def test_every_cell_that_a_test_claims_has_a_result(claimed):
    results = recorded()
    shown = {module: results[module].cells if module in results else set() for module in claimed}
    missing = {module: cells - shown[module] for module, cells in claimed.items()}
    assert {module: cells for module, cells in missing.items() if cells} == {}, REMEDY


def test_every_result_is_claimed_by_a_test(claimed):
    left = {
        module: shown.cells - claimed.get(module, set()) for module, shown in recorded().items()
    }
    assert {module: cells for module, cells in left.items() if cells} == {}, REMEDY


def test_a_method_of_a_version_has_one_outcome(claimed):
    cells = {cell for module in claimed.values() for cell in module}
    places = Counter((cell.client, cell.version, cell.method) for cell in cells)
    assert [place for place, outcomes in places.items() if outcomes > 1] == []


def test_the_page_is_what_the_results_say():
    assert PAGE.read_text() == page(recorded()), REMEDY
