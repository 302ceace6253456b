"""Processes of a home that outlived who started them, found and ended.

Trainers and replicas outlive a killed control on purpose. After a clean stop there are none of
them; this is for the stop that could not be clean.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from homefire.foundation.home import Home
from homefire.foundation.process import ProcessId, identify, is_alive, send_signal

_LOOK_INTERVAL_S = 0.05
"""How often a process is looked at where the kernel has no pidfd (macOS)."""


def find_leftovers(home: Home) -> list[ProcessId]:
    """Services that were started as `python -m homefire.… SPEC` with a spec file of this home."""
    inside = os.fsencode(home.root.absolute()) + b"/"
    found: list[ProcessId] = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().split(b"\0")
        except OSError:
            continue
        is_service = b"-m" in words and any(word.startswith(b"homefire.") for word in words)
        if is_service and any(word.startswith(inside) for word in words):
            process = identify(int(entry.parent.name))
            if process is not None:
                found.append(process)
    return found


def end(processes: Sequence[ProcessId], *, grace_s: float) -> None:
    """SIGTERM, and SIGKILL for those that are still there after `grace_s`."""
    for process in processes:
        send_signal(process, signal.SIGTERM)
    _wait_gone(processes, timeout_s=grace_s)
    kill(processes)


def kill(processes: Sequence[ProcessId]) -> None:
    for process in processes:
        send_signal(process, signal.SIGKILL)
    _wait_gone(processes, timeout_s=5.0)


def _wait_gone(processes: Sequence[ProcessId], *, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    for process in processes:
        while is_alive(process) and (left_s := deadline - time.monotonic()) > 0:
            _wait_one(process, left_s)


def _wait_one(process: ProcessId, timeout_s: float) -> None:
    if not hasattr(os, "pidfd_open"):
        threading.Event().wait(min(_LOOK_INTERVAL_S, timeout_s))
        return
    with contextlib.suppress(ProcessLookupError):
        descriptor = os.pidfd_open(process.pid)
        try:
            select.select([descriptor], [], [], timeout_s)
        finally:
            os.close(descriptor)
