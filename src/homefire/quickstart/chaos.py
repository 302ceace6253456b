"""`homefire quickstart --chaos`: kills every process of its homefire while the loop runs.

The loop knows nothing of it. A thread follows the job's record from outside and, at chosen optimizer
steps, sends SIGKILL: engine, trainer front, control plane, replica and gateway each alone, then all
at once. `homefire up` itself lives on: it is what a machine's service manager would restart.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Self

from homefire.foundation.events import read_events
from homefire.foundation.home import Home
from homefire.foundation.process import ProcessId, identify, send_signal
from homefire.quickstart.promises import promise
from homefire.quickstart.settings import QuickstartSettings
from homefire.quickstart.story import Story
from homefire.wire.errors import InvalidArgument

_LOOK_EVERY_S = 0.02


class Victim(StrEnum):
    ENGINE = "engine"
    FRONT = "trainer front"
    CONTROL = "control plane"
    REPLICA = "replica"
    GATEWAY = "gateway"


@dataclass(frozen=True)
class Strike:
    """Once so many optimizer steps are applied, these processes are killed."""

    after_steps: int
    victims: tuple[Victim, ...]


def schedule(settings: QuickstartSettings) -> list[Strike]:
    """The trainer's side while it is taught, the sampler's in the reinforcement, then everything."""
    taught = settings.supervised_steps
    reinforced = settings.rl_steps * settings.updates_per_step
    plan = [
        (0.2 * taught, Victim.ENGINE),
        (0.5 * taught, Victim.FRONT),
        (0.8 * taught, Victim.CONTROL),
        (taught + 0.2 * reinforced, Victim.REPLICA),
        (taught + 0.4 * reinforced, Victim.GATEWAY),
    ]
    each = [Strike(int(at), (victim,)) for at, victim in plan]
    return [*each, Strike(int(taught + 0.7 * reinforced), tuple(Victim))]


class Chaos:
    """A context: kills while its block runs, and complains at its end of strikes that were not made."""

    def __init__(self, home: Home, strikes: Sequence[Strike], story: Story) -> None:
        self._home = home
        self._strikes = list(strikes)
        self._story = story
        self._known = _names(home.root / "jobs")
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="chaos", daemon=True)
        self._job: Path | None = None
        self._offset = self._num_steps = 0
        self.killed: list[Victim] = []

    @property
    def job(self) -> str:
        """The id of the job that was followed."""
        promise(self._job is not None, "no trainer job was made, so nothing was killed")
        return "" if self._job is None else self._job.name

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        self._thread.join()
        if error is None and self._strikes:
            left = ", ".join(victim for strike in self._strikes for victim in strike.victims)
            raise InvalidArgument(
                f"the run ended before these could be killed: {left}",
                hint="give it more --steps",
                field="steps",
            )

    def _follow(self) -> None:
        while self._strikes and not self._over.wait(_LOOK_EVERY_S):
            if self._steps_applied() >= self._strikes[0].after_steps:
                self._strike()

    def _steps_applied(self) -> int:
        if self._job is None:
            fresh = sorted(_names(self._home.root / "jobs") - self._known)
            self._job = self._home.job(fresh[0]) if fresh else None
        if self._job is not None:
            for offset, event in read_events(self._job / "events.jsonl", self._offset):
                self._offset = offset
                self._num_steps += event["event"] == "optim_step"
        return self._num_steps

    def _strike(self) -> None:
        """The next strike, if all of its victims live: they may be on their way up from the last one."""
        victims = self._strikes[0].victims
        found = [process for victim in victims if (process := self._process(victim)) is not None]
        if len(found) < len(victims):
            return
        del self._strikes[0]
        hits = [send_signal(process, signal.SIGKILL) for process in found]
        hit = [victim for victim, was_alive in zip(victims, hits, strict=True) if was_alive]
        self.killed += hit
        names = ", ".join(hit)
        self._story.say(f"chaos: killed {names} after optimizer step {self._num_steps}")

    def _process(self, victim: Victim) -> ProcessId | None:
        pid = self._pid(victim)
        return None if pid is None else identify(pid)

    def _pid(self, victim: Victim) -> int | None:
        """The newest that is on record; it may be dead."""
        match victim:
            case Victim.ENGINE:
                return self._last_pid("engine_started")
            case Victim.FRONT:
                return self._last_pid("started")
            case Victim.CONTROL | Victim.GATEWAY:
                return _recorded_pid(self._home.run / f"{victim.name.lower()}.json")
            case Victim.REPLICA:
                logs = sorted((self._home.root / "deployments").glob("quickstart-*/0/events.jsonl"))
                return _last_pid(logs[-1], "started") if logs else None

    def _last_pid(self, event: str) -> int | None:
        return None if self._job is None else _last_pid(self._job / "events.jsonl", event)


def verify_replay(home: Home, job: str) -> str:
    """Does the job again from step 0 of its journal, in a fresh process; a sentence of what came out."""
    words = ["trainer", "replay", job, "--verify", "--json", "--home", str(home.root)]
    run = subprocess.run(
        [sys.executable, "-m", "homefire.cli.main", *words],
        capture_output=True,
        text=True,
        check=False,
    )
    promise(bool(run.stdout), f"the replay of {job} failed: {run.stderr.strip()}")
    found = json.loads(run.stdout)
    differing = [*found["divergences"], *found["differences"]]
    promise(not differing, f"the replay of {job} came out otherwise: {differing[:3]}")
    promise(found["start"] is None, f"the replay of {job} began at {found['start']}, not at step 0")
    (end,) = found["slots"].values()
    return (
        f"replayed {found['num_replayed']} operations from step 0 in a fresh process: every result"
        f" and the final state are the same bits (step {end['step']}, digest {end['digest'][:12]})"
    )


def _names(directory: Path) -> set[str]:
    return {path.name for path in directory.glob("*")}


def _last_pid(log: Path, event: str) -> int | None:
    pids = [fields["pid"] for _, fields in read_events(log) if fields["event"] == event]
    return pids[-1] if pids else None


def _recorded_pid(record: Path) -> int | None:
    try:
        return json.loads(record.read_bytes())["process"]["pid"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
