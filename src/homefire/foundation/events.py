"""`events.jsonl`: what a service did, one JSON object a line, appended by its owner alone.

Control tails these files from an offset, so a dead control loses nothing. Every event has `at`
(Unix seconds) and `event`; the rest depends on the event (see docs/records.md).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from homefire.foundation.clock import Clock


class EventLog:
    """Appends whole lines; a torn last line (power loss) is skipped by readers."""

    def __init__(self, path: Path, clock: Clock) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._clock = clock
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def append(self, event: str, **fields: Any) -> None:
        line = msgspec.json.encode({"at": self._clock.now(), "event": event, **fields})
        os.write(self._file, line + b"\n")

    def close(self) -> None:
        os.close(self._file)


def read_events(path: Path, offset: int = 0) -> Iterator[tuple[int, dict[str, Any]]]:
    """Events from a byte offset on, each with the offset behind it."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            offset += len(line)
            try:
                yield offset, msgspec.json.decode(line, type=dict[str, Any])
            except msgspec.DecodeError:
                continue
