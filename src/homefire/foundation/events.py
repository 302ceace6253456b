"""`events.jsonl`: what a service did, one JSON object a line, appended by its owner alone.

Control tails these files from an offset, so a dead control loses nothing. Every event has `at`
(Unix seconds) and `event`; the rest depends on the event (see docs/records.md).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from homefire.foundation.clock import Clock

log = logging.getLogger(__name__)
_MOST_UNWRITTEN_BYTES = 4 << 20


class EventLog:
    """Appends whole lines; a torn last line (power loss) is skipped by readers.

    A disk that is full stops nobody: events wait in memory and are written with the next one, from the
    byte on where the disk stopped. Above 4 MiB the newest are lost.
    """

    def __init__(self, path: Path, clock: Clock) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._clock = clock
        self._unwritten = b""
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def append(self, event: str, **fields: Any) -> None:
        line = msgspec.json.encode({"at": self._clock.now(), "event": event, **fields})
        if len(self._unwritten) < _MOST_UNWRITTEN_BYTES:
            self._unwritten += line + b"\n"
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[os.write(self._file, self._unwritten) :]
        except OSError as exc:
            log.warning("events wait for the disk: %s", exc)

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
