"""What the trainers' events say about now: who was last busy, and which states a recovery would load.

The files only grow, so each is read once, from where reading stopped.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace

import msgspec

from homefire.control.job_records import EVENTS_FILE
from homefire.foundation.home import Home

_LOADS = frozenset({"state_loaded", "model_created"})


class _Event(msgspec.Struct):
    """The fields that matter here."""

    event: str
    at: float = 0.0
    model_id: str = ""
    name: str = ""


_decoder = msgspec.json.Decoder(_Event)


class StateLoad(msgspec.Struct, frozen=True):
    """A state that a model took its weights from."""

    at: float
    model_id: str
    path: str
    """As the client gave it."""


@dataclass
class JobActivity:
    last_at: dict[str, float] = field(default_factory=dict[str, float])
    """When the last operation of a model ended, by model id; Unix time in seconds."""
    loads: list[StateLoad] = field(default_factory=list[StateLoad])
    """Those since the newest recovery point: replaying the journal repeats them."""
    offset: int = 0

    def note(self, event: _Event) -> None:
        if event.model_id:
            self.last_at[event.model_id] = event.at
        if event.event in _LOADS and event.name:
            self.loads.append(StateLoad(event.at, event.model_id, event.name))
        if event.event == "recovery_point":
            self.loads.clear()


class Activities:
    """By job. `of` blocks on the disk, and may be called from any thread."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._by_job: dict[str, JobActivity] = {}
        self._lock = threading.Lock()

    def of(self, job_id: str) -> JobActivity:
        with self._lock:
            activity = self._by_job.setdefault(job_id, JobActivity())
            self._catch_up(job_id, activity)
            return replace(activity, last_at=dict(activity.last_at), loads=list(activity.loads))

    def _catch_up(self, job_id: str, activity: JobActivity) -> None:
        try:
            file = (self._home.job(job_id) / EVENTS_FILE).open("rb")
        except FileNotFoundError:
            return
        with file:
            file.seek(activity.offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return  # still being written
                activity.offset += len(line)
                try:
                    activity.note(_decoder.decode(line))
                except msgspec.DecodeError:
                    continue  # torn by a power loss
