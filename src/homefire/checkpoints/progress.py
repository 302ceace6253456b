"""How far a worker is, in a file beside its result: for whoever waits for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec

from homefire.foundation.durable import write_file

Report = Callable[[str, int, int], None]
"""What is being done, how much of it is done, and how much there is."""


class Progress(msgspec.Struct, frozen=True):
    """Example: Progress("applying deltas", 12, 40)."""

    stage: str
    done: int
    total: int


def unreported(stage: str, done: int, total: int) -> None:
    """For work that nobody follows."""


def report_to(path: Path) -> Report:
    """Writes the file at every new stage and every whole per cent of one."""
    last: tuple[str, int] | None = None

    def report(stage: str, done: int, total: int) -> None:
        nonlocal last
        mark = stage, 100 * done // max(total, 1)
        if mark != last:
            last = mark
            write_file(path, msgspec.json.encode(Progress(stage, done, total)))

    return report


def read_progress(path: Path) -> Progress | None:
    """None before the first report."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Progress)
    except (OSError, msgspec.DecodeError):
        return None
