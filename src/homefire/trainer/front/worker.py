"""The loop that owns the engine: bring it up, run what is queued, in order, until told to stop.

bring up (start, load, recover) -> next request -> run -> journal the result -> …
             ^                                      |
             └──────────── the engine died ─────────┘
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

from homefire.foundation.clock import Clock
from homefire.foundation.events import EventLog
from homefire.foundation.failpoints import failpoint
from homefire.trainer.front import operations
from homefire.trainer.front.engine_process import Engine, EngineDied
from homefire.trainer.front.futures import Futures
from homefire.trainer.front.journal import Journal
from homefire.trainer.front.live_model import LiveModel
from homefire.trainer.front.operation_events import OperationEvents
from homefire.trainer.front.operations import (
    CreateHandle,
    LoadAdapterWeights,
    LoadTrainState,
    Operation,
    OperationKind,
    SaveOperation,
    SaveTrainState,
)
from homefire.trainer.front.outcome import Outcome, failed
from homefire.trainer.front.packs import Member, pack_of, run_pack
from homefire.trainer.front.records import (
    Completed,
    Handle,
    PackCompleted,
    Packed,
    Record,
    SaveTaken,
    encode_result,
)
from homefire.trainer.front.recovery import Recovered, Recovery, RedoSave, divergence
from homefire.trainer.front.recovery_points import RecoveryPoints
from homefire.trainer.front.saves_in_flight import SavesInFlight
from homefire.trainer.front.sessions import Ledger, Request, refusal_of
from homefire.trainer.front.status import StatusBoard
from homefire.trainer.front.turns import Turns
from homefire.wire.errors import (
    EngineFailed,
    ErrorRecord,
    HomefireError,
    IncompleteGradient,
    InternalError,
    SequenceGap,
    StorageFailed,
    Unavailable,
)
from homefire.wire.internal import TrainerState

log = logging.getLogger(__name__)
_MAX_DEATHS_PER_REQUEST = 2
_MAX_FAILED_STARTS = 3
_STORAGE_RETRY_S = 1.0
_FORGET_EVERY_S = 30.0

OpenModel = Callable[[Engine], Awaitable[LiveModel]]


class Worker:
    def __init__(
        self,
        *,
        clock: Clock,
        ledger: Ledger,
        futures: Futures,
        journal: Journal,
        events: EventLog,
        status: StatusBoard,
        points: RecoveryPoints,
        make_recovery: Callable[[RedoSave], Recovery],
        start_engine: Callable[[], Awaitable[Engine]],
        open_model: OpenModel,
        turns: Turns,
        pack_tokens: Callable[[], int],
    ) -> None:
        self._clock = clock
        self._ledger = ledger
        self._futures = futures
        self._journal = journal
        self._events = events
        self._status = status
        self._points = points
        self._recovery = make_recovery(self._redo_save)
        self._start_engine = start_engine
        self._open_model = open_model
        self._turns = turns
        self._pack_tokens = pack_tokens
        """Of all requests that run as one."""
        told = OperationEvents(ledger, events)
        self._tell = told.tell
        self._saves = SavesInFlight(clock, self._append, told)
        self._wake = asyncio.Event()
        self._stopping = False
        self._forgetting: list[asyncio.Future[None]] = []
        """Who waits until no recovery would load a state again."""
        self._deaths: Counter[str] = Counter()
        self._forgot_at = clock.monotonic()
        self._task: asyncio.Task[None] | None = None
        self.model: LiveModel | None = None
        """While operations run."""

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    def wake(self) -> None:
        """Something was queued."""
        self._wake.set()
        self._read_ahead()

    def _read_ahead(self) -> None:
        if self.model is not None:
            self.model.ahead.begin(self._turns.coming())

    async def forget_loads(self) -> None:
        """Returns when no recovery would load a state again, so that any state may be deleted.

        Between operations, by a recovery point. Unavailable while the engine is not up, StorageFailed
        when no point can be written.
        """
        if not self._ledger.has_loaded:
            return
        if self.model is None or self._stopping or self._task is None:
            raise Unavailable("the trainer is starting or stopping", hint="try again in a minute")
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._forgetting.append(done)
        self._wake.set()
        await asyncio.wait({done, self._task}, return_when=asyncio.FIRST_COMPLETED)
        if not done.done():
            raise Unavailable("the trainer stopped meanwhile", hint="try again in a minute")
        done.result()

    async def stop(self) -> None:
        """Finishes the running operation, takes a recovery point and ends the engine."""
        self._stopping = True
        self._wake.set()
        if self._status.state is not TrainerState.FAILED:
            self._status.enter(TrainerState.STOPPING)
        if self._task is None:
            return
        if self.model is None:
            self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        failed_starts = 0
        while not self._stopping:
            engine: Engine | None = None
            try:
                engine = await self._start_engine()
                self.model = await self._bring_up(engine)
                failed_starts = 0
                await self._serve(self.model)
            except EngineDied as died:
                failed_starts = await self._note_death(died, engine, failed_starts)
            except HomefireError as error:
                self._give_up(error)
            except Exception as exc:
                log.exception("the worker broke")
                self._give_up(InternalError(f"{type(exc).__name__}: {exc}", hint="see the log"))
            finally:
                self.model = None
                if engine is not None:
                    await engine.kill()
                await self._saves.settled()
            if self._status.state is TrainerState.FAILED:
                return

    # Bringing the engine up ------------------------------------------------------------------

    async def _bring_up(self, engine: Engine) -> LiveModel:
        self._status.enter(TrainerState.STARTING)
        started = self._clock.monotonic()
        model = await self._open_model(engine)
        self._events.append("engine_started", pid=engine.pid, seconds=self._seconds_since(started))
        if self._ledger.position:
            self._status.enter(TrainerState.RECOVERING)
            self._note_recovery(await self._recovery.run(model), started)
        self._status.enter(TrainerState.READY)
        return model

    def _note_recovery(self, recovered: Recovered, started: float) -> None:
        self._events.append(
            "recovered",
            point=recovered.point,
            replayed=recovered.num_replayed,
            divergences=recovered.divergences[:10],
            seconds=self._seconds_since(started),
        )
        self._status.count_replayed(recovered.num_replayed)
        if recovered.divergences:
            error = divergence(recovered)
            log.error("%s", error)
            self._status.report(ErrorRecord.of(error))

    async def _note_death(self, died: EngineDied, engine: Engine | None, failed_starts: int) -> int:
        """Restarts are counted until one succeeds: an engine that cannot come up is given up."""
        if not self._stopping:
            self._status.enter(TrainerState.STARTING)
        exit_status = await engine.kill() if engine else None
        log.error("%s (exit status %s)", died, exit_status)
        self._events.append("engine_died", detail=str(died), exit_status=exit_status)
        self._status.count_restart()
        self._deaths.update(list(self._ledger.saving))
        failed_starts = 0 if self.model else failed_starts + 1
        if failed_starts >= _MAX_FAILED_STARTS:
            message = f"the engine died {failed_starts} times while starting: {died}"
            self._give_up(EngineFailed(message, hint="see engine.log of the job"))
        return failed_starts

    def _give_up(self, error: HomefireError) -> None:
        log.error("the trainer stands still: %s", error)
        self._status.failed(ErrorRecord.of(error))

    # Running ---------------------------------------------------------------------------------

    async def _serve(self, model: LiveModel) -> None:
        exited = asyncio.create_task(model.engine.wait())
        exited.add_done_callback(lambda _: self._wake.set())
        try:
            while not self._stopping:
                if self._ledger.queue:
                    await self._run_next(model)
                else:
                    await self._wait_for_work()
                if exited.done() and not self._stopping:
                    raise EngineDied("the engine died while idle")
                await self._keep_house(model)
        finally:
            exited.cancel()
            model.ahead.close()
        await self._saves.settled()
        if self._points.is_dirty:
            await self._take_point(model)
        await self._forget(model)
        await model.engine.shut_down()

    async def _wait_for_work(self) -> None:
        self._wake.clear()
        try:
            async with asyncio.timeout(self._points.due_in_s):
                await self._wake.wait()
        except TimeoutError:
            return

    async def _keep_house(self, model: LiveModel) -> None:
        now = self._clock.monotonic()
        if now - self._forgot_at > _FORGET_EVERY_S:
            self._forgot_at = now
            self._ledger.forget(self._futures.forget_old())
        if self._points.due_in_s == 0.0:
            await self._begin_point(model)
        if self._forgetting:
            await self._forget(model)

    async def _forget(self, model: LiveModel) -> None:
        if self._ledger.has_loaded:
            await self._take_point(model)
        waiting, self._forgetting = self._forgetting, []
        for done in waiting:
            if done.done():
                continue  # its caller has gone
            if self._ledger.has_loaded:
                done.set_exception(StorageFailed("no recovery point could be taken"))
            else:
                done.set_result(None)

    async def _take_point(self, model: LiveModel) -> None:
        """Returns when the point counts, or has failed."""
        point = await self._begin_point(model)
        if point is not None:
            await point

    async def _begin_point(self, model: LiveModel) -> asyncio.Task[None] | None:
        """It is written while training goes on."""
        try:
            ending = await self._points.begin(model)
        except HomefireError as error:
            self._note_no_point(error)
            return None
        return self._saves.chain(self._end_point(ending))

    async def _end_point(self, ending: Coroutine[Any, Any, None]) -> None:
        try:
            await ending
        except HomefireError as error:
            self._note_no_point(error)
        finally:
            ending.close()
            self._wake.set()

    def _note_no_point(self, error: HomefireError) -> None:
        """No reason to stop: the journal still has everything."""
        log.warning("no recovery point could be taken: %s", error)
        self._status.report(ErrorRecord.of(error))

    async def _run_next(self, model: LiveModel) -> None:
        self._read_ahead()
        waiting = self._turns.waiting()
        pack = await pack_of(
            waiting,
            self._ledger,
            model,
            token_budget=self._pack_tokens(),
            apart=self._deaths.keys(),
        )
        if len(pack) > 1:
            await self._run_pack(model, pack)
        else:
            await self._run_alone(model, waiting[0])

    async def _run_alone(self, model: LiveModel, request: Request) -> None:
        self._turns.note(request)
        handle = self._ledger.handles[request.model_id]
        operation = await model.ahead.operation(request)
        await self._keep_what_was_loaded(model, operation)
        if _reads_checkpoints(operation):
            await self._saves.settled()
        if isinstance(operation, SaveOperation) and self._refusal(request, handle) is None:
            await self._run_save(model, request, operation, handle)
            return
        started = self._clock.monotonic()
        failpoint("worker.before_run")
        try:
            outcome = await self._outcome(model, request, operation, handle)
        except EngineDied:
            self._deaths[request.request_id] += 1
            raise
        completed = self._completed(model, request, outcome, position=self._ledger.position + 1)
        await self._make_history(completed)
        self._deaths.pop(request.request_id, None)
        self._tell(request, outcome, step=completed.step, ms=1000 * self._seconds_since(started))

    async def _run_save(
        self, model: LiveModel, request: Request, operation: SaveOperation, handle: Handle
    ) -> None:
        """Returns when the bytes are taken: from then on the weights may change."""
        started = self._clock.monotonic()
        try:
            outcome = asyncio.ensure_future(await model.begin_save(request, operation, handle))
        except EngineDied:
            self._deaths[request.request_id] += 1
            raise
        except HomefireError as error:
            outcome = asyncio.get_running_loop().create_future()
            outcome.set_result(failed(error))
        step = self._step_of(model, handle.slot)
        position, at = self._ledger.position + 1, self._clock.now()
        taken = SaveTaken(request_id=request.request_id, position=position, step=step, at=at)
        failpoint("save.before_taken")
        await self._append(taken)
        failpoint("save.after_taken")
        self._saves.follow(request, outcome, step=step, started=started)

    async def _redo_save(self, model: LiveModel, request_id: str) -> None:
        """Replay of a save that was only taken: the same bytes, for the model is where it was."""
        request, taken = self._ledger.requests[request_id], self._ledger.saving[request_id]
        operation = operations.decode(request.operation)
        handle = self._ledger.handles[request.model_id]
        started = self._clock.monotonic()
        if self._deaths[request_id] >= _MAX_DEATHS_PER_REQUEST:
            outcome = failed(_too_deadly())
        else:
            outcome = await model.run(request, operation, handle)
        await self._saves.end(request, outcome, step=taken.step, started=started)

    async def _run_pack(self, model: LiveModel, pack: Sequence[Member]) -> None:
        """Its members run alone from now on if the engine dies of them, or refuses them together."""
        for member in pack:
            self._turns.note(member.request)
        request_ids = [member.request.request_id for member in pack]
        await self._append(Packed(request_ids=request_ids, at=self._clock.now()))
        started = self._clock.monotonic()
        try:
            outcomes = await run_pack(pack, model)
        except EngineDied:
            self._deaths.update(request_ids)
            raise
        except HomefireError as error:
            log.warning("%d requests cannot run as one and run alone: %s", len(pack), error)
            return
        position = self._ledger.position + 1
        completed = [
            self._completed(model, member.request, outcome, position=position + number)
            for number, (member, outcome) in enumerate(zip(pack, outcomes, strict=True))
        ]
        await self._make_history(PackCompleted(completed=completed))
        ms = 1000 * self._seconds_since(started)
        for member, outcome, record in zip(pack, outcomes, completed, strict=True):
            self._tell(member.request, outcome, step=record.step, ms=ms)

    async def _keep_what_was_loaded(self, model: LiveModel, operation: Operation) -> None:
        """A replay would load a state again, which is another one once it is overwritten."""
        overwrites = isinstance(operation, SaveTrainState) and operation.overwrite
        if overwrites and self._ledger.has_loaded:
            await self._take_point(model)

    def _step_of(self, model: LiveModel, slot: str) -> int:
        """A closed slot keeps the number that it had."""
        live = model.step_of(slot)
        return self._ledger.steps.get(slot, 0) if live is None else live

    async def _outcome(
        self, model: LiveModel, request: Request, operation: Operation, handle: Handle
    ) -> Outcome:
        refusal = self._refusal(request, handle)
        if refusal is not None:
            return await model.fail(operation, handle, refusal)
        try:
            return await model.run(request, operation, handle)
        except EngineDied:
            raise
        except Exception as exc:
            log.exception("request %s broke", request.request_id)
            error = InternalError(f"{type(exc).__name__}: {exc}", hint="see the trainer's log")
            return await model.fail(operation, handle, error)

    def _refusal(self, request: Request, handle: Handle) -> HomefireError | None:
        """Why a request must not even be tried."""
        if self._deaths[request.request_id] >= _MAX_DEATHS_PER_REQUEST:
            return _too_deadly()
        if request.kind is OperationKind.CREATE_MODEL:
            return None
        return refusal_of(handle) or _broken_order(request, handle)

    def _completed(
        self, model: LiveModel, request: Request, outcome: Outcome, *, position: int
    ) -> Completed:
        return Completed(
            request_id=request.request_id,
            position=position,
            result=encode_result(outcome.result),
            ok=outcome.error is None,
            step=self._step_of(model, self._ledger.handles[request.model_id].slot),
            discarded=outcome.discarded,
            at=self._clock.now(),
        )

    async def _make_history(self, record: Completed | PackCompleted) -> None:
        failpoint("journal.before_applied")
        await self._append(record)

    async def _append(self, record: Record) -> None:
        """A full disk holds everything up here, and loses nothing."""
        while True:
            try:
                await self._journal.append(record)
                return
            except StorageFailed as error:
                if self._stopping:
                    raise
                log.error("%s; trying again", error)
                self._status.progress(str(error))
                await asyncio.sleep(_STORAGE_RETRY_S)

    def _seconds_since(self, started: float) -> float:
        return round(self._clock.monotonic() - started, 6)


def _too_deadly() -> EngineFailed:
    return EngineFailed(
        f"the engine died {_MAX_DEATHS_PER_REQUEST} times during this request",
        hint="make the batch smaller; see engine.log of the job",
    )


def _reads_checkpoints(operation: Operation) -> bool:
    """It may read what a save before it writes."""
    loads = isinstance(operation, LoadTrainState | LoadAdapterWeights)
    return loads or (isinstance(operation, CreateHandle) and operation.load is not None)


def _broken_order(request: Request, handle: Handle) -> HomefireError | None:
    if request.missing is not None:
        late = request.missing == request.seq
        why = "came too late" if late else f"never arrived, so {request.seq} cannot run"
        return SequenceGap(
            f"seq_id {request.missing} of {handle.model_id} {why}",
            hint="the gradient was cleared where a step was due; send the step's data again",
        )
    if request.kind is OperationKind.OPTIM_STEP and handle.hole is not None:
        return IncompleteGradient(
            f"the gradient lacks seq_id {handle.hole.seq} ({handle.hole.why}); it was cleared, not stepped",
            hint="send all of the step's forward_backward calls again",
        )
    return None
