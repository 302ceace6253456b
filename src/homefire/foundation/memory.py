"""How much memory this machine has, and how much of it is free. Linux; elsewhere what is free is unknown."""

from __future__ import annotations

import os
from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")
"""Version 2; a container sees its own limit at the root."""


def total_bytes() -> int:
    """Of the machine, or of the container that this runs in."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _cgroup_limit()
    return machine if limit is None else min(machine, limit)


def available_bytes() -> int | None:
    """What could be taken without swapping; None where nothing says so."""
    try:
        lines = _MEMINFO.read_text().splitlines()
    except OSError:
        return None
    free = next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvail")), None)
    limit, used = _cgroup_limit(), _cgroup_used()
    if free is None or limit is None or used is None:
        return free
    return min(free, max(0, limit - used))


def _cgroup_limit() -> int | None:
    text = _read(_CGROUP / "memory.max")
    return int(text) if text.isdigit() else None


def _cgroup_used() -> int | None:
    """Without the file cache, which is given up when memory is asked for."""
    current = _read(_CGROUP / "memory.current")
    if not current.isdigit():
        return None
    fields = dict(line.split() for line in _read(_CGROUP / "memory.stat").splitlines())
    return max(0, int(current) - int(fields.get("inactive_file", 0)))


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
