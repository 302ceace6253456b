"""No test is skipped in silence."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import skips

SUITE = {
    "a test": "import pytest\ndef test_it(): pytest.skip('why not')",
    "an expected failure": "import pytest\n@pytest.mark.xfail\ndef test_it(): assert False",
    "a module": "import pytest\npytest.importorskip('no_such_module')\ndef test_it(): pass",
}


def status_of(suite: str, directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (directory / "test_suite.py").write_text(suite)
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "skips", "-p", "no:cacheprovider", "-q", *arguments],
        env={**os.environ, "PYTHONPATH": str(Path(skips.__file__).parent)},
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("skipped", SUITE)
def test_a_skip_that_is_not_listed_fails_the_run(tmp_path, skipped):
    run = status_of(SUITE[skipped], tmp_path)
    assert "not in tests/skips.txt" in run.stdout
    assert run.returncode == 1


@pytest.mark.parametrize("skipped", ["a test", "a module"])
def test_so_does_one_in_a_worker(tmp_path, skipped):
    run = status_of(SUITE[skipped], tmp_path, "-n", "2", "--dist", "loadfile")
    assert "not in tests/skips.txt" in run.stdout
    assert run.returncode != 0


def test_a_run_without_skips_is_green(tmp_path):
    assert status_of("def test_it(): pass", tmp_path).returncode == 0
