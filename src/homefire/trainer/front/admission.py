"""Taking requests on: known duplicates, bounds, the journal, and only then a request id.

A request id that was answered is a promise: the request is on disk and will have a result.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from homefire.foundation.clock import Clock
from homefire.foundation.failpoints import failpoint
from homefire.trainer.front import operations
from homefire.trainer.front.futures import Futures
from homefire.trainer.front.gaps import GapTimers
from homefire.trainer.front.graph_plans import GraphPlans, graph_key
from homefire.trainer.front.job_budget import JobBudget
from homefire.trainer.front.journal import Journal
from homefire.trainer.front.operations import CreateHandle, Operation, OperationKind, RunPass
from homefire.trainer.front.records import (
    Accepted,
    FailedResult,
    GapExpired,
    Handle,
    Record,
    Seen,
    SessionCreated,
    encode_result,
)
from homefire.trainer.front.sessions import Ledger, Load, refusal_of
from homefire.trainer.front.slot_policy import SlotPolicy
from homefire.wire.engine import ExecutionPlan, SlotKind
from homefire.wire.errors import (
    ErrorRecord,
    HomefireError,
    InvalidArgument,
    NotFound,
    Overloaded,
    SequenceGap,
    SequenceReused,
    TooManyModels,
)
from homefire.wire.ids import model_id
from homefire.wire.specs import TrainerSpec

MAX_WAITING_REQUESTS = 4096
"""Per model."""
MAX_WAITING_BYTES = 4 << 30
_FINISH_KEY = "finish"
"""Of the unloads that end a session: finishing it twice is once."""


@dataclass(frozen=True)
class Submission:
    """An operation as the journal will have it."""

    kind: OperationKind
    packed: bytes
    digest: str
    plan: ExecutionPlan | None
    graph_key: str | None = None
    """See `graph_plans`."""


@dataclass(frozen=True)
class _Flight:
    """A request on its way to the disk: a duplicate waits for it instead of starting another."""

    seen: Seen
    landed: asyncio.Future[None]


class Admission:
    """Owned by the front's event loop. `wake` is called when something was queued."""

    def __init__(
        self,
        spec: TrainerSpec,
        clock: Clock,
        ledger: Ledger,
        policy: SlotPolicy,
        futures: Futures,
        journal: Journal,
        wake: Callable[[], None],
        budget: JobBudget,
    ) -> None:
        self._spec = spec
        self._clock = clock
        self._ledger = ledger
        self._policy = policy
        self._futures = futures
        self._journal = journal
        self._wake = wake
        self._budget = budget
        self._graphs = GraphPlans()
        self._flights: dict[tuple[str, int | str], _Flight] = {}
        self.gaps = GapTimers(clock, ledger, self.expire, timeout_s=spec.gap_timeout_s)

    def submission(self, operation: Operation) -> Submission:
        """Pure; takes milliseconds per MB, so large operations are prepared off the event loop."""
        encoded = operations.encode(operation)
        kind, digest = operations.kind_of(operation), operations.digest_of(encoded)
        packed = operations.pack(encoded)
        if not isinstance(operation, RunPass):
            return Submission(kind, packed, digest, None)
        plan = self._budget.plan([row.num_tokens for row in operation.body.rows])
        return Submission(kind, packed, digest, plan, graph_key(operation.body, plan))

    async def create_session(self) -> str:
        session_id = self._policy.new_session_id()
        await self._journal.append(SessionCreated(session_id, self._clock.now()))
        return session_id

    async def finish_session(self, session_id: str) -> None:
        """What the session alone used is given up, behind all that was accepted for it."""
        self._policy.check_session(session_id)
        for handle in self._policy.ends_with_session(session_id):
            if handle.order.missing is not None:
                await self.expire(handle.model_id, handle.order.missing)
            submission = self.submission(self._policy.unload(handle))
            await self.accept_at_end(handle.model_id, _FINISH_KEY, submission)

    def handle(self, model: str) -> Handle:
        handle = self._ledger.handles.get(model)
        if handle is None:
            raise NotFound(
                f"no model {model!r}", hint="create one with create_model", field="model_id"
            )
        return handle

    async def accept_in_order(self, model: str, seq: int, submission: Submission) -> str:
        """The request's id, at once even when earlier numbers are still to come."""
        handle = self.handle(model)
        if seq < 1:
            raise InvalidArgument(f"seq_id is {seq}", hint="count from 1", field="seq_id")
        known = await self._known(model, seq, handle.recent.get(seq), submission)
        if known is not None:
            return known
        refusal = refusal_of(handle) or self._too_late(handle, seq)
        if refusal is not None:
            return self.fail_now(refusal)
        self._check_room(model, submission)
        return await self._accept(model, seq, "", submission)

    async def accept_at_end(self, model: str, key: str, submission: Submission) -> str:
        """Runs after all that the model has accepted. Refused while a number is missing."""
        handle = self.handle(model)
        known = await self._known(model, key, handle.keys.get(key), submission) if key else None
        if known is not None:
            return known
        refusal = refusal_of(handle)
        if refusal is not None:
            return self.fail_now(refusal)
        if handle.order.missing is not None:
            raise SequenceGap(
                f"seq_id {handle.order.missing} of {model} is missing, so there is no end to run at",
                hint="wait for the results of earlier calls first",
            )
        self._check_room(model, submission)
        return await self._accept(model, None, key, submission)

    async def create(self, operation: CreateHandle) -> str:
        """A new handle; the same (session, model_seq_id) again gives the same request id."""
        self._policy.check_session(operation.session_id)
        model = model_id(operation.session_id, operation.model_seq_id)
        submission = self.submission(operation)
        handle = self._ledger.handles.get(model)
        known = await self._known(model, "", handle.created_by if handle else None, submission)
        if known is not None:
            return known
        try:
            self._policy.check_room(operation.kind, num_arriving=self._num_arriving())
        except TooManyModels as error:
            return self.fail_now(error)
        return await self._accept(model, None, "", submission)

    def _num_arriving(self) -> int:
        """Models on their way to the disk."""
        return sum(key == "" for _, key in self._flights)

    def fail_now(self, error: HomefireError) -> str:
        """A request id whose future has already failed; nothing is journaled for it."""
        request_id = self._new_request_id()
        result = encode_result(FailedResult(ErrorRecord.of(error)))
        self._futures.resolve(request_id, result, at=self._clock.now())
        return request_id

    async def expire(self, model: str, missing: int) -> None:
        """Held requests are released, to fail in their order."""
        await self._journal.append(GapExpired(model, missing))
        self._wake()

    async def _known(
        self, model: str, key: int | str, seen: Seen | None, submission: Submission
    ) -> str | None:
        flight = self._flights.get((model, key))
        seen = flight.seen if flight else seen
        if seen is None:
            return None
        if seen.digest != submission.digest:
            what = f"seq_id {key}" if isinstance(key, int) else "this request"
            raise SequenceReused(
                f"{what} of {model} came before with another payload",
                hint="give every request a number of its own",
                field="seq_id",
            )
        if flight is not None:
            await asyncio.shield(flight.landed)
        return seen.request_id

    async def _accept(self, model: str, seq: int | None, key: str, submission: Submission) -> str:
        record = Accepted(
            request_id=self._new_request_id(),
            model_id=model,
            seq=seq,
            key=key,
            digest=submission.digest,
            kind=submission.kind,
            operation=submission.packed,
            plan=self._with_graph(model, submission),
            at=self._clock.now(),
        )
        creates = submission.kind is OperationKind.CREATE_MODEL
        slot = (model, seq if seq is not None else key) if seq or key or creates else None
        await self._land(record, slot)
        self.gaps.watch(self._ledger.handles[model])
        self._wake()
        return record.request_id

    def _with_graph(self, model: str, submission: Submission) -> ExecutionPlan | None:
        handle = self._ledger.handles.get(model)
        keeps = handle is not None and handle.kind is not SlotKind.REFERENCE
        key = submission.graph_key if keeps and self._spec.held_graph_bytes != 0 else None
        use = self._graphs.use(model, submission.kind, key)
        return submission.plan and msgspec.structs.replace(submission.plan, graph=use)

    async def _land(self, record: Accepted, slot: tuple[str, int | str] | None) -> None:
        """To the disk, shielded: a client that goes away does not take its request back."""
        landed = asyncio.ensure_future(self._append(record))
        if slot is not None:
            self._flights[slot] = _Flight(Seen(record.request_id, record.digest), landed)
            landed.add_done_callback(lambda _: self._flights.pop(slot, None))
        await asyncio.shield(landed)

    async def _append(self, record: Record) -> None:
        failpoint("admission.before_journal")
        await self._journal.append(record)

    def _too_late(self, handle: Handle, seq: int) -> HomefireError | None:
        if seq >= handle.order.next:
            return None
        return SequenceGap(
            f"seq_id {seq} of {handle.model_id} came too late: {handle.order.next} is next",
            hint="its result is forgotten, or it was given up when it did not arrive; send it anew",
            field="seq_id",
        )

    def _check_room(self, model: str, submission: Submission) -> None:
        load = self._ledger.loads.get(model, Load())
        if load.num_requests >= MAX_WAITING_REQUESTS:
            raise Overloaded(
                f"{model} has {load.num_requests} waiting requests", hint="retry later"
            )
        if load.size_bytes + len(submission.packed) > MAX_WAITING_BYTES:
            raise Overloaded(f"{model} has {load.size_bytes} waiting bytes", hint="retry later")

    def _new_request_id(self) -> str:
        return f"{self._spec.job}.{secrets.token_hex(8)}"
