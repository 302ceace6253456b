"""How much of a disk may be taken before what runs could not finish any more."""

from __future__ import annotations

from pathlib import Path

from homefire.foundation.disk import SYSTEM, Disk

RESERVE_BYTES = 256 << 20
_RESERVED_SHARE = 20
"""One part in so many, of disks where that is less."""


def spare_bytes(directory: Path, disk: Disk = SYSTEM) -> int:
    """What new work may take: what is free, less a reserve for results, records and events of work that
    was taken on already. Negative when the reserve is being used."""
    found = disk.statvfs(directory)
    total, free = found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize
    return free - min(RESERVE_BYTES, total // _RESERVED_SHARE)
