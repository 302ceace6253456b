"""A fresh engine is brought to where the journal ends: newest recovery point, then replay in order.

Forward passes are not replayed. What is replayed is compared with what was answered the first time;
a difference is reported, never hidden. Requests that were accepted but have no result are not
touched here: the worker runs them afterwards.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from homefire.foundation.disk import SYSTEM, Disk
from homefire.foundation.failpoints import failpoint
from homefire.trainer.front import operations
from homefire.trainer.front.journal import read_journal
from homefire.trainer.front.live_model import LiveModel
from homefire.trainer.front.operations import (
    CreateHandle,
    LoadAdapterWeights,
    LoadTrainState,
    Operation,
    OperationKind,
    RunPass,
    SaveSnapshot,
    StepOptimizer,
    UnloadHandle,
)
from homefire.trainer.front.outcome import Outcome, failed
from homefire.trainer.front.packs import member_of, run_pack
from homefire.trainer.front.records import (
    STATE_DIGEST,
    Accepted,
    Completed,
    FailedResult,
    Handle,
    PackCompleted,
    PassResult,
    PlainResult,
    PointTaken,
    SaveEnded,
    SaveTaken,
    decode_result,
)
from homefire.trainer.front.sessions import Ledger, Request
from homefire.wire.errors import (
    DigestMismatch,
    HomefireError,
    ReplayDivergence,
    StateReplaced,
    StorageFailed,
    UnknownSnapshot,
)
from homefire.wire.specs import TrainerSpec

_CHANGING = frozenset(OperationKind) - {
    OperationKind.FORWARD,
    OperationKind.SAVE_WEIGHTS,
    OperationKind.SAVE_WEIGHTS_EXTERNAL,
}


RedoSave = Callable[[LiveModel, str], Awaitable[None]]


@dataclass
class Recovered:
    point: str | None = None
    """The recovery point that was loaded; None: from the base model."""
    num_replayed: int = 0
    divergences: list[str] = field(default_factory=list[str])


class Recovery:
    """Brings one engine up to the journal's end. `progress(done, total)` is called on the way."""

    def __init__(
        self,
        spec: TrainerSpec,
        ledger: Ledger,
        progress: Callable[[int, int], None],
        redo_save: RedoSave,
        disk: Disk = SYSTEM,
    ) -> None:
        """`redo_save` is called with the request of each save that was taken and has not ended, when the
        model is where it was taken."""
        self._spec = spec
        self._ledger = ledger
        self._progress = progress
        self._redo_save = redo_save
        self._disk = disk
        self._journal = journal_directory(spec)

    async def run(self, model: LiveModel, points: Sequence[PointTaken] | None = None) -> Recovered:
        """From the newest usable one of `points` (default: all that are kept), oldest first; with none
        of them from the base model.

        Raises DigestMismatch when no usable point is left and the journal was trimmed.
        """
        candidates = self._ledger.points if points is None else points
        point = await self._load_newest_point(model, candidates)
        recovered = Recovered(point.name if point else None)
        start = point.position if point else 0
        history = await asyncio.to_thread(_completed_after, self._journal, start, self._disk)
        self._check_complete(history, start)
        request_ids = {record.request_id for together in history for record in _records(together)}
        payloads = await asyncio.to_thread(_accepted, self._journal, request_ids, self._disk)
        for done, together in enumerate(history):
            self._progress(done, len(history))
            failpoint("recovery.before_replay")
            if isinstance(together, SaveTaken):
                await self._redo_save(model, together.request_id)
                recovered.num_replayed += 1
                continue
            accepted = [payloads.get(completed.request_id) for completed in together]
            if len(together) > 1:
                await self._replay_pack(model, accepted, together, recovered)
            else:
                await self._replay(model, accepted[0], together[0], recovered)
        return recovered

    async def _load_newest_point(
        self, model: LiveModel, points: Sequence[PointTaken]
    ) -> PointTaken | None:
        damaged: HomefireError | None = None
        kept = _kept_points(self._spec, self._disk)
        for point in reversed(points):
            directory = recovery_directory(self._spec) / point.name
            if point.name not in kept:
                continue
            try:
                await model.load_recovery(directory)
            except (DigestMismatch, StorageFailed) as error:
                damaged = error
                continue
            return point
        if damaged is not None and not reaches_back(self._journal, self._disk):
            raise damaged
        return None

    def _check_complete(self, history: Sequence[Together], start: int) -> None:
        expected = self._ledger.position - start
        found = sum(len(_records(together)) for together in history)
        if found != expected:
            raise DigestMismatch(
                f"the journal has {found} of the {expected} operations after {start}",
                hint="the job's recovery points are missing or damaged; branch from a checkpoint",
            )

    async def _replay(
        self,
        model: LiveModel,
        accepted: Accepted | None,
        completed: Completed,
        recovered: Recovered,
    ) -> None:
        if accepted is None or accepted.kind not in _CHANGING:
            return
        operation = await operations.decode_off_loop(accepted.operation)
        if not completed.ok:
            await self._replay_failure(model, accepted, operation, completed)
            return
        recovered.num_replayed += 1
        outcome = await self._replay_success(model, accepted, operation)
        if outcome is not None:
            _check_same_state(operation, outcome, completed)
            recovered.divergences += _compare(accepted, outcome, completed)

    async def _replay_pack(
        self,
        model: LiveModel,
        accepted: Sequence[Accepted | None],
        completed: Sequence[Completed],
        recovered: Recovered,
    ) -> None:
        """The same requests as one pass, those that failed too: the others' bits depend on them."""
        found = [record for record in accepted if record is not None]
        if len(found) != len(completed):
            return
        for record, outcome, first in zip(
            found, await self._pack_again(model, found), completed, strict=True
        ):
            recovered.num_replayed += first.ok
            recovered.divergences += _compare(record, outcome, first)

    async def _pack_again(self, model: LiveModel, accepted: Sequence[Accepted]) -> list[Outcome]:
        """An engine that cannot pack them any more runs each alone: other bits, but no gradient lost."""
        handles = [self._ledger.handles[record.model_id] for record in accepted]
        requests = [_request(record) for record in accepted]
        try:
            pack = [
                await member_of(request, handle, model)
                for request, handle in zip(requests, handles, strict=True)
            ]
            return await run_pack(pack, model)
        except HomefireError:
            return [
                await model.run(
                    request, await operations.decode_off_loop(request.operation), handle
                )
                for request, handle in zip(requests, handles, strict=True)
            ]

    async def _replay_failure(
        self, model: LiveModel, accepted: Accepted, operation: Operation, completed: Completed
    ) -> None:
        if isinstance(operation, CreateHandle):
            await _attach_again(model, operation)
        if completed.discarded:
            await model.discard_gradients(self._ledger.handles[accepted.model_id].slot)

    async def _replay_success(
        self, model: LiveModel, accepted: Accepted, operation: Operation
    ) -> Outcome | None:
        handle = self._ledger.handles[accepted.model_id]
        match operation:
            case SaveSnapshot():
                return await _adopt(model, handle, operation)
            case (
                RunPass()
                | StepOptimizer()
                | LoadTrainState()
                | LoadAdapterWeights()
                | CreateHandle()
                | UnloadHandle()
            ):
                return await model.run(_request(accepted), operation, handle)
            case _:
                return None


def journal_directory(spec: TrainerSpec) -> Path:
    return Path(spec.job_dir) / "journal"


def recovery_directory(spec: TrainerSpec) -> Path:
    return Path(spec.job_dir) / "recovery"


def divergence(recovered: Recovered) -> ReplayDivergence:
    count = len(recovered.divergences)
    return ReplayDivergence(
        f"{count} replayed operations differ from what was answered: {recovered.divergences[0]}",
        hint="on an accelerator small differences are expected; on CPU this is a defect to report",
    )


def _check_same_state(operation: Operation, outcome: Outcome, completed: Completed) -> None:
    """Everything behind a load of other bytes would differ, and none of it would be a defect."""
    load = operation.load if isinstance(operation, CreateHandle) else operation
    if not isinstance(load, LoadTrainState):
        return
    first, again = decode_result(completed.result), outcome.result
    if isinstance(again, FailedResult):
        raise _replaced(load, f"cannot be loaded any more: {again.error.message}")
    if not isinstance(first, PlainResult) or not isinstance(again, PlainResult):
        return
    known, found = (result.body.get(STATE_DIGEST) for result in (first, again))
    if known is not None and known != found:
        raise _replaced(load, f"has other bytes now: {found}, and had {known}")


def _replaced(load: LoadTrainState, why: str) -> StateReplaced:
    return StateReplaced(
        f"the replay cannot pass the load of state {load.path!r}, which {why}",
        hint="put the state back under its name, or go on in a new job from a checkpoint that is newer",
    )


async def _attach_again(model: LiveModel, operation: CreateHandle) -> None:
    """What failed was the load; on a live slot, the leftover gradient was cleared before it."""
    try:
        await model.attach_again(operation)
    except HomefireError:
        return


async def _adopt(model: LiveModel, handle: Handle, operation: SaveSnapshot) -> Outcome | None:
    try:
        await model.adopt_snapshot(handle.slot, operation.name)
    except UnknownSnapshot:
        return None
    except HomefireError as error:
        return failed(error)
    return None


def _request(accepted: Accepted) -> Request:
    return Request(
        accepted.request_id,
        accepted.model_id,
        accepted.seq,
        accepted.kind,
        accepted.operation,
        accepted.plan,
        segment=0,
    )


def _compare(accepted: Accepted, outcome: Outcome, completed: Completed) -> Iterator[str]:
    """Describes a difference between a replayed result and the journaled one, if there is one."""
    first, again = decode_result(completed.result), outcome.result
    what = f"{accepted.kind.value} {accepted.seq or ''} of {accepted.model_id}"
    if isinstance(first, FailedResult) and isinstance(again, FailedResult):
        return
    if isinstance(again, FailedResult):
        yield f"{what} now fails: {again.error.message}"
    elif isinstance(first, FailedResult):
        yield f"{what} failed before and now succeeds"
    elif isinstance(first, PassResult) and isinstance(again, PassResult):
        if first.output.arrays != again.output.arrays:
            yield f"{what}: {', '.join(first.output.arrays) or 'the arrays'} differ"
        elif first.output.metrics != again.output.metrics:
            yield f"{what}: metrics differ"
    elif isinstance(first, PlainResult) and not first.is_repeated_by(again):
        yield f"{what}: the result differs"


def _kept_points(spec: TrainerSpec, disk: Disk) -> list[str]:
    try:
        return disk.listdir(recovery_directory(spec))
    except FileNotFoundError:
        return []


Together = list[Completed] | SaveTaken
"""What is replayed as one: a pack, a request alone, or a save that has not ended."""


def _completed_after(directory: Path, position: int, disk: Disk) -> list[Together]:
    """In order."""
    endings = {
        r.request_id: r for _, r in read_journal(directory, disk) if isinstance(r, SaveEnded)
    }
    return [
        _with_ending(together, endings)
        for together in _history(directory, disk)
        if _records(together)[0].position > position
    ]


def _history(directory: Path, disk: Disk) -> Iterator[Together]:
    for _, record in read_journal(directory, disk):
        match record:
            case Completed():
                yield [record]
            case PackCompleted():
                yield record.completed
            case SaveTaken():
                yield record
            case _:
                pass


def _records(together: Together) -> Sequence[Completed | SaveTaken]:
    return [together] if isinstance(together, SaveTaken) else together


def _with_ending(together: Together, endings: Mapping[str, SaveEnded]) -> Together:
    """A save that has ended was completed where it was taken."""
    if not isinstance(together, SaveTaken):
        return together
    ended = endings.get(together.request_id)
    if ended is None:
        return together
    taken = Completed(
        request_id=together.request_id,
        position=together.position,
        result=ended.result,
        ok=ended.ok,
        step=together.step,
        at=ended.at,
    )
    return [taken]


def _accepted(directory: Path, request_ids: set[str], disk: Disk) -> dict[str, Accepted]:
    records = (record for _, record in read_journal(directory, disk))
    wanted = (r for r in records if isinstance(r, Accepted) and r.request_id in request_ids)
    return {record.request_id: record for record in wanted}


def reaches_back(directory: Path, disk: Disk = SYSTEM) -> bool:
    """Whether the journal still has the first operation."""
    return any(_records(found)[0].position == 1 for found in _history(directory, disk))
