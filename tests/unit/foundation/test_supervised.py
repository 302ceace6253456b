"""A child whose parent is killed ends by itself, with the SIGTERM of a clean stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

CHILD = """
import signal, sys, time
from homefire.foundation.supervised import end_with_supervisor
signal.signal(signal.SIGTERM, lambda *_: sys.exit(print("ended cleanly", flush=True)))
end_with_supervisor(take_over_within_s=0.0)
print("up", flush=True)
time.sleep(600)
"""
PARENT = f"""
import subprocess, sys
subprocess.Popen([sys.executable, "-c", {CHILD!r}]).wait()
"""


def test_what_outlives_its_supervisor_stops_as_it_would_have_been_asked_to() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as parent:
        assert parent.stdout is not None
        try:
            assert parent.stdout.readline() == "up\n"
            parent.kill()
            assert parent.stdout.read() == "ended cleanly\n"
        except BaseException:
            os.killpg(parent.pid, signal.SIGKILL)
            raise
