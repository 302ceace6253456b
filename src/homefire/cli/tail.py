"""The end of a log file."""

from __future__ import annotations

from collections import deque
from pathlib import Path


def last_lines(path: Path, count: int) -> list[str]:
    """Empty when there is no such file."""
    try:
        with path.open(errors="replace") as file:
            return [line.rstrip("\n") for line in deque(file, maxlen=max(count, 0))]
    except FileNotFoundError:
        return []
