"""Which process is which: a pid alone proves nothing, since pids are reused."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import msgspec


class ProcessId(msgspec.Struct, frozen=True):
    """A pid and when it started, in clock ticks since boot (0 where /proc is missing)."""

    pid: int
    start_ticks: int


def this_process() -> ProcessId:
    return identify(os.getpid()) or ProcessId(os.getpid(), 0)


def identify(pid: int) -> ProcessId | None:
    """The process that has this pid now; None when there is none or it is a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return _identify_without_proc(pid)
    except ProcessLookupError:
        return None
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in {"Z", "X"} else ProcessId(pid, int(fields[19]))


def is_alive(process: ProcessId) -> bool:
    return identify(process.pid) == process


def send_signal(process: ProcessId, number: signal.Signals) -> bool:
    """Signals the process if it is still the same one; says whether it was."""
    if not is_alive(process):
        return False
    try:
        os.kill(process.pid, number)
    except ProcessLookupError:
        return False
    return True


def _identify_without_proc(pid: int) -> ProcessId | None:
    if Path("/proc/self").exists():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    return ProcessId(pid, 0)
