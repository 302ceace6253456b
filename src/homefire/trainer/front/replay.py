"""A job done again from its own journal, in fresh engines, beside the job itself.

Nothing of the job is touched: its journal is linked or copied into a workspace, engines work there.

    replayed   from the base model (or the oldest recovery point, where the journal was trimmed), every
               operation in order, each result compared with what was answered
    recovered  as after a crash: from the newest recovery point

Both end where the journal ends, so their masters, optimizers and gradients must have the same bits.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from homefire.checkpoints import file_entry, open_store
from homefire.foundation.clock import Clock
from homefire.trainer.front.engine_process import Engine, ask
from homefire.trainer.front.futures import Futures
from homefire.trainer.front.graph_board import GraphBoard
from homefire.trainer.front.journal import read_journal, segments
from homefire.trainer.front.live_model import LiveModel, open_model
from homefire.trainer.front.records import PointTaken
from homefire.trainer.front.recovery import (
    Recovered,
    Recovery,
    journal_directory,
    reaches_back,
    recovery_directory,
)
from homefire.trainer.front.sessions import Ledger
from homefire.trainer.front.slot_policy import slot_policy
from homefire.wire.engine import Digest, WeightsDigest
from homefire.wire.errors import DigestMismatch, FailedPrecondition
from homefire.wire.specs import TrainerSpec

StartEngine = Callable[[TrainerSpec], Awaitable[Engine]]
Progress = Callable[[int, int], None]
_WEIGHTS = "*.safetensors"


@dataclass(frozen=True)
class SlotEnd:
    """Where one slot stands at the end of the journal."""

    step: int
    digest: str
    """Of the serving weights, as snapshots and completions name it."""


@dataclass(frozen=True)
class Replayed:
    start: str | None
    """The recovery point that the replay began with; None: the base model."""
    num_replayed: int
    divergences: list[str]
    """Operations that gave another result than the first time."""
    slots: dict[str, SlotEnd]


@dataclass(frozen=True)
class Verified:
    replayed: Replayed
    recovered_from: str | None
    differences: list[str]
    """Files of the final states (masters, optimizer, gradient) that differ; empty: bit for bit equal."""

    @property
    def ok(self) -> bool:
        return not self.differences and not self.replayed.divergences


class Replay:
    """`workspace` is an empty directory, on the job's file system if links should be possible."""

    def __init__(
        self, spec: TrainerSpec, workspace: Path, start_engine: StartEngine, clock: Clock
    ) -> None:
        self._workspace = workspace
        self._start_engine = start_engine
        self._clock = clock
        self._spec = msgspec.structs.replace(spec, job_dir=str(workspace / "job"))
        _copy_history(spec, self._spec)

    async def run(self, progress: Progress) -> Replayed:
        """FailedPrecondition when there is nothing to replay, DigestMismatch for a damaged journal."""
        return await self._live("replayed", self._origin(), progress)

    async def verify(self, progress: Progress) -> Verified:
        """`run`, then the recovery from the newest point, and their final states compared."""
        replayed = await self.run(progress)
        points = self._ledger().points
        recovered = await self._live("recovered", points, progress)
        differences = _differences(self._workspace / "replayed", self._workspace / "recovered")
        differences += [
            f"slot {name}: {replayed.slots.get(name)} and {recovered.slots.get(name)}"
            for name in sorted(replayed.slots.keys() | recovered.slots.keys())
            if replayed.slots.get(name) != recovered.slots.get(name)
        ]
        return Verified(replayed, recovered.start, differences)

    def _origin(self) -> list[PointTaken]:
        ledger = self._ledger()
        if not ledger.position:
            raise FailedPrecondition(
                f"job {self._spec.job} has completed no operation",
                hint="there is nothing to replay",
            )
        if reaches_back(journal_directory(self._spec)):
            return []
        if not ledger.points:
            raise DigestMismatch(f"the journal of {self._spec.job} has lost its beginning")
        return ledger.points[:1]

    async def _live(self, name: str, points: Sequence[PointTaken], progress: Progress) -> Replayed:
        """One life of an engine; its final state is left in the workspace under `name`."""
        ledger = self._ledger()
        engine = await self._start_engine(self._spec)
        try:
            store = open_store(self._spec.store_root, self._clock)
            policy = slot_policy(self._spec, ledger)
            graphs = GraphBoard(self._clock, limit_s=self._spec.held_graph_limit_s)
            model = await open_model(engine, self._spec, store, policy, graphs)
            recovered = await Recovery(self._spec, ledger, progress, _leave).run(model, points)
            await (await model.begin_recovery(self._workspace / name))
            slots = {slot: await _end_of(model, slot) for slot in model.open_slots}
            await engine.shut_down()
        finally:
            await engine.kill()
        return _replayed(recovered, slots)

    def _ledger(self) -> Ledger:
        ledger = Ledger(Futures(self._clock))
        for segment, record in read_journal(journal_directory(self._spec)):
            ledger.apply(record, segment)
        return ledger


async def _leave(model: LiveModel, request_id: str) -> None:
    """A save that had not ended when the journal was copied is the job's own."""


async def _end_of(model: LiveModel, slot: str) -> SlotEnd:
    found = await ask(model.engine, WeightsDigest(slot), Digest)
    return SlotEnd(found.step, found.digest)


def _replayed(recovered: Recovered, slots: dict[str, SlotEnd]) -> Replayed:
    return Replayed(recovered.point, recovered.num_replayed, recovered.divergences, slots)


def _copy_history(source: TrainerSpec, copy: TrainerSpec) -> None:
    """Segments that are finished are linked; the last is copied, for the job may still write it."""
    journal, target = journal_directory(source), journal_directory(copy)
    target.mkdir(parents=True)
    numbers = segments(journal)
    for number in numbers:
        name = f"{number:08d}.log"
        if number == numbers[-1] or not _linked(journal / name, target / name):
            shutil.copyfile(journal / name, target / name)
    points = recovery_directory(source)
    if points.is_dir():
        recovery_directory(copy).symlink_to(points.absolute(), target_is_directory=True)


def _linked(source: Path, link: Path) -> bool:
    try:
        os.link(source, link)
    except OSError:
        return False
    return True


def _differences(left: Path, right: Path) -> list[str]:
    found = [
        {path.name: file_entry(path).sha256 for path in directory.glob(_WEIGHTS)}
        for directory in (left, right)
    ]
    names = sorted(found[0].keys() | found[1].keys())
    return [f"{name} differs" for name in names if found[0].get(name) != found[1].get(name)]
