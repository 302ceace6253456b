"""The quickstart's loop, unmodified, while every process of its homefire is killed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.mark.timeout(900)
def test_the_quickstart_survives_the_death_of_everything(tmp_path):
    words = ["quickstart", "--chaos", "--supervised-steps", "60", "--steps", "4"]
    run = subprocess.run(
        [sys.executable, "-m", "homefire.cli.main", *words, "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env={**os.environ, "HOME": str(tmp_path)},
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    kills = [line for line in run.stdout.splitlines() if "chaos: killed" in line]
    assert len(kills) == 6
    for process in ("engine", "trainer front", "control plane", "replica", "gateway"):
        assert len([line for line in kills if process in line]) == 2, (process, kills)
    assert "every result and the final state are the same bits" in run.stdout
