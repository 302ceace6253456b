from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from homefire.trainer.front.job_lock import sole_front
from homefire.wire.errors import Unavailable

HOLDER = """
import sys
from pathlib import Path
from homefire.trainer.front.job_lock import sole_front
with sole_front(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_front_of_a_job_is_told_who_the_first_is(tmp_path: Path) -> None:
    with (
        sole_front(tmp_path),
        pytest.raises(Unavailable, match=f"process {os.getpid()} is the trainer of"),
        sole_front(tmp_path, wait_s=0.0),
    ):
        pass


def test_the_lock_of_a_front_that_was_killed_is_free(tmp_path: Path) -> None:
    words = [sys.executable, "-c", HOLDER, str(tmp_path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(Unavailable, match=f"process {holder.pid}"),
            sole_front(tmp_path, wait_s=0.0),
        ):
            pass
        holder.kill()
        holder.wait()
        with sole_front(tmp_path, wait_s=0.0):
            pass
