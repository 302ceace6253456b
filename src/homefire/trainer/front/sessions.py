"""Sessions, the handles that they hold on slots, and their requests: what the journal's records add up to.

A new handle on a slot fences the one that was there: its running request finishes, those that wait
fail. Handles on the frozen reference never fence. Live and at start, state changes by `apply` alone,
so a restarted front is where it was. Which slot a model gets is `slot_policy`'s business.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

from homefire.trainer.front import operations
from homefire.trainer.front.futures import Futures
from homefire.trainer.front.operations import CreateHandle, OperationKind
from homefire.trainer.front.records import (
    Accepted,
    Completed,
    FailedResult,
    GapExpired,
    Handle,
    Hole,
    PackCompleted,
    Packed,
    PointTaken,
    Record,
    Reopened,
    ResultsKept,
    SaveEnded,
    SaveTaken,
    Seen,
    SessionCreated,
    Snapshot,
    decode_result,
)
from homefire.wire.engine import ExecutionPlan, LoraSpec, SlotKind
from homefire.wire.errors import FailedPrecondition, HomefireError, Superseded
from homefire.wire.ids import model_id

NUM_POINTS_KEPT = 2
Key = TypeVar("Key", int, str)


@dataclass
class Request:
    """An accepted request that has no result yet."""

    request_id: str
    model_id: str
    seq: int | None
    kind: OperationKind
    operation: bytes
    plan: ExecutionPlan | None
    segment: int
    """Where in the journal it was accepted."""
    missing: int | None = None
    """The number before it that never came, which fails it."""
    was_packed: bool = False
    """It ran together with others, and has no result: from now on it runs alone."""


@dataclass
class Load:
    """What a model has accepted and not finished."""

    num_requests: int = 0
    size_bytes: int = 0


class Ledger:
    """Owned by one event loop. Only `apply` and the pruning of old results change it."""

    def __init__(self, futures: Futures) -> None:
        self.sessions: set[str] = set()
        self.handles: dict[str, Handle] = {}
        self.requests: dict[str, Request] = {}
        """Accepted and not completed."""
        self.queue: deque[str] = deque()
        """Requests that may run, in order of execution; the first may be running."""
        self.loads: dict[str, Load] = {}
        """By model id."""
        self.points: list[PointTaken] = []
        """Recovery points, oldest first."""
        self.saving: dict[str, SaveTaken] = {}
        """Of `requests`, saves that are taken and have not ended."""
        self._loaded_at = 0
        """Position of the last request that loaded a state."""
        self.steps: dict[str, int] = {}
        """Optimizer steps by slot, closed slots included."""
        self.position = 0
        self.num_accepted = 0
        self._futures = futures

    def apply(self, record: Record, segment: int) -> None:
        match record:
            case SessionCreated():
                self.sessions.add(record.session_id)
            case Accepted():
                self._accept(record, segment)
            case GapExpired():
                self._expire(record)
            case Packed():
                self._note_pack(record)
            case Completed():
                self._complete(record, segment)
            case PackCompleted():
                for completed in record.completed:
                    self._complete(completed, segment)
            case SaveTaken():
                self._take_save(record)
            case SaveEnded():
                self._end_save(record, segment)
            case PointTaken():
                self.points = [*self.points, record][-NUM_POINTS_KEPT:]
            case ResultsKept():
                for kept in record.results:
                    self._futures.move(kept, segment)
            case Snapshot():
                self._restore(record)
            case Reopened():
                pass

    def snapshot(self) -> Snapshot:
        return Snapshot(
            position=self.position,
            steps=dict(self.steps),
            sessions=sorted(self.sessions),
            handles=list(self.handles.values()),
            num_accepted=self.num_accepted,
            points=self.points,
        )

    @property
    def has_loaded(self) -> bool:
        """A state was loaded since the newest point: a recovery would load it again."""
        return self._loaded_at > (self.points[-1].position if self.points else 0)

    @property
    def step(self) -> int:
        """Optimizer steps on all slots that are remembered."""
        return sum(self.steps.values())

    @property
    def num_unsaved(self) -> int:
        """Operations since the newest recovery point."""
        return self.position - (self.points[-1].position if self.points else 0)

    def adapter(self, slot: str) -> LoraSpec | None:
        """The adapter on a slot: its first model's, since later ones had to ask for the same."""
        made = (h for h in self.handles.values() if h.slot == slot and not h.failure)
        return next((handle.lora for handle in made), None)

    def floor(self, default: int) -> int:
        """The oldest segment with an accepted request that has no result yet."""
        return min((r.segment for r in self.requests.values()), default=default)

    def forget(self, gone: Iterable[str]) -> None:
        """Requests whose results are forgotten are no longer known again as duplicates."""
        forgotten = set(gone)
        for handle in self.handles.values() if forgotten else ():
            handle.recent = _without(handle.recent, forgotten)
            handle.keys = _without(handle.keys, forgotten)
        for handle in [h for h in self.handles.values() if self._is_over(h)]:
            del self.handles[handle.model_id]
            self.loads.pop(handle.model_id, None)
            self.steps.pop(handle.slot, None)

    def _is_over(self, handle: Handle) -> bool:
        """A model whose slot went with it, which nobody asks about and no recovery would replay."""
        if handle.ended_at is None or handle.slot != handle.model_id:
            return False
        replayed_from = self.points[0].position if len(self.points) == NUM_POINTS_KEPT else 0
        is_asked_for = handle.recent or handle.keys
        known = self._futures.is_known(handle.created_by.request_id)
        return handle.ended_at <= replayed_from and not is_asked_for and not known

    def _accept(self, record: Accepted, segment: int) -> None:
        request = Request(
            record.request_id,
            record.model_id,
            record.seq,
            record.kind,
            record.operation,
            record.plan,
            segment,
        )
        self.requests[record.request_id] = request
        self.num_accepted += 1
        load = self.loads.setdefault(record.model_id, Load())
        load.num_requests += 1
        load.size_bytes += len(record.operation)
        self._futures.expect(record.request_id)
        if record.model_id not in self.handles:
            self._create_handle(record)
        handle = self.handles[record.model_id]
        seen = Seen(record.request_id, record.digest)
        if record.seq is None:
            if record.key:
                handle.keys[record.key] = seen
            self.queue.append(record.request_id)
        else:
            handle.recent[record.seq] = seen
            self._arrive(handle, request, record.seq)

    def _arrive(self, handle: Handle, request: Request, seq: int) -> None:
        """A number that was given up while its request was on the way to the disk comes too late."""
        if seq < handle.order.next:
            request.missing = seq
            self.queue.append(request.request_id)
        else:
            self._release(handle.order.arrive(seq, request.request_id))

    def _lighten(self, request: Request) -> None:
        load = self.loads[request.model_id]
        load.num_requests -= 1
        load.size_bytes -= len(request.operation)

    def _create_handle(self, record: Accepted) -> None:
        create = operations.decode(record.operation)
        if not isinstance(create, CreateHandle):
            raise ValueError(f"{record.model_id} does not exist")
        handle = Handle(
            model_id=model_id(create.session_id, create.model_seq_id),
            session_id=create.session_id,
            slot=create.slot,
            kind=create.kind,
            lora=create.lora,
            base_model=create.base_model,
            created_by=Seen(record.request_id, record.digest),
            own_passes=create.own_passes,
        )
        if create.kind is not SlotKind.REFERENCE:
            self._fence(handle)
        self.handles[handle.model_id] = handle

    def _fence(self, by: Handle) -> None:
        """What is held behind gaps of an old handle is released too: to fail, in its place."""
        for handle in self.handles.values():
            if handle.slot == by.slot and handle.superseded_by is None:
                handle.superseded_by = by.session_id
                by.fenced.append(handle.model_id)
                self._release(handle.order.give_up())

    def _expire(self, record: GapExpired) -> None:
        handle = self.handles[record.model_id]
        handle.hole = handle.hole or Hole(record.missing, "it never arrived")
        released = handle.order.give_up()
        for request_id in released:
            if request_id in self.requests:
                self.requests[request_id].missing = record.missing
        self._release(released)

    def _release(self, request_ids: Iterable[str]) -> None:
        """A snapshot may still name requests that were completed in segments since deleted."""
        self.queue.extend(r for r in request_ids if r in self.requests)

    def _note_pack(self, record: Packed) -> None:
        for request_id in record.request_ids:
            if request_id in self.requests:
                self.requests[request_id].was_packed = True

    def _complete(self, record: Completed, segment: int) -> None:
        self.position = record.position
        request = self.requests.pop(record.request_id, None)
        if record.request_id in self.queue:
            self.queue.remove(record.request_id)
        self._futures.resolve(record.request_id, record.result, at=record.at, segment=segment)
        if request is not None:
            self._lighten(request)
            self._note_effect(request, record)

    def _take_save(self, record: SaveTaken) -> None:
        self.position = record.position
        if record.request_id in self.queue:
            self.queue.remove(record.request_id)
        request = self.requests.get(record.request_id)
        if request is not None:
            self.saving[record.request_id] = record
            self.steps[self.handles[request.model_id].slot] = record.step

    def _end_save(self, record: SaveEnded, segment: int) -> None:
        self.saving.pop(record.request_id, None)
        request = self.requests.pop(record.request_id, None)
        self._futures.resolve(record.request_id, record.result, at=record.at, segment=segment)
        if request is not None:
            self._lighten(request)

    def _note_effect(self, request: Request, record: Completed) -> None:
        """A failed forward_backward leaves a hole in the gradient; what clears that, heals it."""
        handle = self.handles[request.model_id]
        self.steps[handle.slot] = record.step
        match request.kind:
            case OperationKind.FORWARD_BACKWARD if not record.ok:
                handle.hole = handle.hole or Hole(request.seq, _why(record))
            case OperationKind.OPTIM_STEP:
                handle.hole = None
            case OperationKind.LOAD_WEIGHTS | OperationKind.LOAD_ADAPTER if record.ok:
                handle.hole = None
                self._loaded_at = record.position
            case OperationKind.CREATE_MODEL if not record.ok:
                handle.failure = _why(record)
                handle.ended_at = record.position
            case OperationKind.CREATE_MODEL:
                create = operations.decode(request.operation)
                loads = isinstance(create, CreateHandle) and create.load is not None
                self._loaded_at = record.position if loads else self._loaded_at
            case OperationKind.UNLOAD_MODEL if record.ok:
                handle.unloaded = True
                handle.ended_at = record.position
            case _:
                pass

    def _restore(self, snapshot: Snapshot) -> None:
        """Only the first record of a journal says something new; later ones repeat what is known."""
        if self.sessions or self.handles:
            return
        self.position, self.steps = snapshot.position, dict(snapshot.steps)
        self.num_accepted = snapshot.num_accepted
        self.sessions = set(snapshot.sessions)
        self.handles = {handle.model_id: handle for handle in snapshot.handles}
        self.points = list(snapshot.points)


def _without(known: dict[Key, Seen], forgotten: set[str]) -> dict[Key, Seen]:
    return {key: seen for key, seen in known.items() if seen.request_id not in forgotten}


def _why(record: Completed) -> str:
    result = decode_result(record.result)
    return result.error.message if isinstance(result, FailedResult) else ""


def refusal_of(handle: Handle) -> HomefireError | None:
    """Why nothing runs on this handle any more."""
    if handle.superseded_by is not None:
        return Superseded(
            f"{handle.model_id} was superseded by session {handle.superseded_by}",
            hint="one client trains at a time; go on with the newer one, or create a model again",
        )
    if handle.unloaded:
        return FailedPrecondition(f"{handle.model_id} was unloaded", hint="create a model again")
    if handle.failure:
        return FailedPrecondition(
            f"{handle.model_id} was never made: {handle.failure}", hint="create a model again"
        )
    return None
