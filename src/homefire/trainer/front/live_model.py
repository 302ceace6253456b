"""The loaded model: turns operations into engine requests and their replies into results.

One object per life of the engine. It knows which slots are open there and how many steps each has.
"""

from __future__ import annotations

from collections.abc import Awaitable
from pathlib import Path

from homefire.checkpoints import CheckpointStore
from homefire.trainer.front.engine_process import Engine, ask, ended, expect
from homefire.trainer.front.graph_board import GraphBoard
from homefire.trainer.front.operations import (
    CreateHandle,
    LoadAdapterWeights,
    LoadTrainState,
    Operation,
    Refused,
    RunPass,
    SaveExternalWeights,
    SaveOperation,
    SaveSnapshot,
    SaveTrainState,
    StepOptimizer,
    UnloadHandle,
)
from homefire.trainer.front.outcome import Fields, Outcome, failed
from homefire.trainer.front.read_ahead import ReadAhead
from homefire.trainer.front.records import (
    STATE_DIGEST,
    STEP_TIME,
    Body,
    Handle,
    PassResult,
    PlainResult,
)
from homefire.trainer.front.sessions import Request
from homefire.trainer.front.slot_checkpoints import SlotCheckpoints
from homefire.trainer.front.slot_policy import SlotPolicy
from homefire.trainer.front.validation import Batch, Limits
from homefire.wire import engine as wire
from homefire.wire.engine import SlotKind, check_adam
from homefire.wire.errors import (
    FailedPrecondition,
    HomefireError,
    InternalError,
)
from homefire.wire.specs import TrainerSpec
from homefire.wire.tinker import PassOutput


class LiveModel:
    """Not for concurrent use: the worker owns it."""

    def __init__(
        self,
        engine: Engine,
        spec: TrainerSpec,
        checkpoints: SlotCheckpoints,
        opened: wire.ModelOpened,
        graphs: GraphBoard,
    ) -> None:
        self._engine = engine
        self._graphs = graphs
        self._checkpoints = checkpoints
        self._steps: dict[str, int] = {}
        """Of the open slots."""
        self._sharing: set[str] = set()
        """Open slots whose passes can be packed with others'."""
        self.opened = opened
        self.limits = Limits(
            opened.vocab_size, min(opened.max_context_length, spec.max_context_length)
        )
        self.ahead = ReadAhead(self.limits)
        """What is prepared of the requests that come next."""

    @property
    def engine(self) -> Engine:
        return self._engine

    @property
    def open_slots(self) -> list[str]:
        return sorted(self._steps)

    def step_of(self, slot: str) -> int | None:
        """Optimizer steps on the slot; None while it is not open."""
        return self._steps.get(slot)

    def shares_passes(self, slot: str) -> bool:
        return slot in self._sharing

    async def run(self, request: Request, operation: Operation, handle: Handle) -> Outcome:
        """Never raises for what is wrong with the request: that is the outcome. May raise EngineDied."""
        try:
            return await self._run(request, operation, handle)
        except HomefireError as error:
            return await self.fail(operation, handle, error)

    async def begin_save(
        self, request: Request, operation: SaveOperation, handle: Handle
    ) -> Awaitable[Outcome]:
        """Its bytes are taken. Raises what is wrong, here or when it is awaited, or EngineDied."""
        _check_allowed(operation, handle)
        return await self._checkpoints.begin_save(operation, handle, seq=request.seq)

    async def fail(self, operation: Operation, handle: Handle, error: HomefireError) -> Outcome:
        """The request fails. A step takes the gradient with it: what follows must not step it later.

        Not so on a superseded handle, where `create_model` names what it discards.
        """
        discards = (
            isinstance(operation, StepOptimizer)
            and handle.kind is not SlotKind.REFERENCE
            and handle.superseded_by is None
            and handle.slot in self._steps
        )
        if discards:
            await self.discard_gradients(handle.slot)
        return failed(error, discarded=discards)

    async def discard_gradients(self, slot: str) -> wire.GradientsDiscarded:
        return await ask(self._engine, wire.DiscardGradients(slot), wire.GradientsDiscarded)

    async def _run(self, request: Request, operation: Operation, handle: Handle) -> Outcome:
        _check_allowed(operation, handle)
        match operation:
            case RunPass():
                return await self._run_pass(request, operation, handle)
            case StepOptimizer():
                return await self._step(operation, handle)
            case SaveTrainState() | SaveSnapshot() | SaveExternalWeights():
                return await (await self.begin_save(request, operation, handle))
            case LoadTrainState():
                return await self._load(operation, handle)
            case LoadAdapterWeights():
                return await self._checkpoints.load_adapter(operation, handle)
            case CreateHandle():
                return await self._create(operation, handle)
            case UnloadHandle():
                return await self._unload(operation, handle)
            case Refused(_, error):
                raise error.exception()

    # Forward, backward, step -----------------------------------------------------------------

    async def _run_pass(self, request: Request, operation: RunPass, handle: Handle) -> Outcome:
        if request.plan is None:
            raise InternalError(f"{request.request_id} has no plan")
        batch = await self.ahead.batch(request, operation)
        body = operation.body
        kind = wire.Forward if body.forward_only else wire.ForwardBackward
        message = kind(
            slot=handle.slot,
            loss_fn=body.loss_fn,
            loss_fn_config=body.loss_fn_config,
            plan=request.plan,
        )
        reply, arrays = await self._engine.call(message, batch.arrays)
        rows = expect(reply, wire.Rows)
        self._graphs.note(rows)
        return pass_outcome(operation, batch, rows, arrays)

    async def _step(self, operation: StepOptimizer, handle: Handle) -> Outcome:
        message = wire.OptimStep(
            slot=handle.slot,
            adam=operation.adam,
            normalization=operation.normalization,
            norm_metrics=operation.norm_metrics,
        )
        stepped = await ask(self._engine, message, wire.Stepped)
        self._steps[handle.slot] = stepped.step
        metrics = {**stepped.metrics, STEP_TIME: stepped.seconds}
        body: Body = {"metrics": metrics, "step": stepped.step}
        return Outcome(PlainResult(body), event="optim_step", fields={"metrics": metrics})

    # Slots -----------------------------------------------------------------------------------

    async def _load(self, operation: LoadTrainState, handle: Handle) -> Outcome:
        loaded, state_digest = await self._checkpoints.load_state(operation, handle)
        self._steps[handle.slot] = loaded.step
        fields: Fields = {
            "name": self._checkpoints.full_path(operation.path, handle.slot),
            "with_optimizer": operation.with_optimizer,
            "digest": loaded.digest,
        }
        body = {"type": "load_weights", "path": operation.path, "model_id": handle.model_id}
        digests = {"digest": loaded.digest, STATE_DIGEST: state_digest}
        result = PlainResult({**body, "step": loaded.step, **digests})
        return Outcome(result, event="state_loaded", fields=fields)

    async def _create(self, operation: CreateHandle, handle: Handle) -> Outcome:
        """A creation that fails leaves no slot behind that it opened."""
        is_new = operation.slot not in self._steps
        discarded = await self.attach(operation)
        try:
            body = await self._created(operation, handle)
        except HomefireError:
            if is_new:
                await self._close(operation.slot)
            raise
        if discarded.num_backward_calls:
            body["gradients_discarded"] = {
                "num_backward_calls": discarded.num_backward_calls,
                "num_loss_tokens": discarded.num_loss_tokens,
            }
        fields: Fields = {
            "session_id": operation.session_id,
            "slot": operation.slot,
            "num_backward_calls": discarded.num_backward_calls,
            "num_loss_tokens": discarded.num_loss_tokens,
        }
        if operation.load is not None:
            path = self._checkpoints.full_path(operation.load.path, operation.slot)
            fields = {**fields, "name": path}
        return Outcome(PlainResult(body), event="model_created", fields=fields)

    async def _created(self, operation: CreateHandle, handle: Handle) -> Body:
        if operation.load is None:
            step = self._steps[operation.slot]
            return {"type": "create_model", "model_id": handle.model_id, "step": step}
        loaded = await self._load(operation.load, handle)
        return dict(loaded.result.body) if isinstance(loaded.result, PlainResult) else {}

    async def attach(self, operation: CreateHandle) -> wire.GradientsDiscarded:
        """Opens the slot on first use. A later handle finds live weights and no leftover gradient."""
        nothing = wire.GradientsDiscarded(num_backward_calls=0, num_loss_tokens=0)
        if operation.slot in self._steps:
            trains = operation.kind is not SlotKind.REFERENCE
            return await self.discard_gradients(operation.slot) if trains else nothing
        message = wire.OpenSlot(slot=operation.slot, kind=operation.kind, lora=operation.lora)
        self._note_slot(await ask(self._engine, message, wire.SlotOpened))
        return nothing

    async def attach_again(self, operation: CreateHandle) -> None:
        """Replay of a creation that failed: the slot that it opened, it closed."""
        if operation.slot in self._steps:
            await self.attach(operation)

    async def _unload(self, operation: UnloadHandle, handle: Handle) -> Outcome:
        if operation.closes_slot:
            await self._close(handle.slot)
        result = PlainResult({"type": "unload_model", "model_id": handle.model_id})
        return Outcome(result, event="model_unloaded", fields={"slot": handle.slot})

    async def _close(self, slot: str) -> None:
        await ask(self._engine, wire.CloseSlot(slot), wire.Done)
        del self._steps[slot]
        self._sharing.discard(slot)

    def _note_slot(self, opened: wire.SlotOpened) -> None:
        self._steps[opened.slot] = opened.step
        if opened.shares_passes:
            self._sharing.add(opened.slot)

    # Recovery --------------------------------------------------------------------------------

    async def adopt_snapshot(self, slot: str, name: str) -> bool:
        """Replay of a save. False when the snapshot was deleted since."""
        return await self._checkpoints.adopt_snapshot(slot, name)

    async def begin_recovery(self, directory: Path) -> Awaitable[wire.RecoverySaved]:
        save = await self._engine.begin(wire.SaveRecovery(str(directory)))
        return ended(save, wire.RecoverySaved)

    async def load_recovery(self, directory: Path) -> None:
        loaded = await ask(self._engine, wire.LoadRecovery(str(directory)), wire.RecoveryLoaded)
        for opened in loaded.slots:
            self._note_slot(opened)


async def open_model(
    engine: Engine,
    spec: TrainerSpec,
    store: CheckpointStore,
    policy: SlotPolicy,
    graphs: GraphBoard,
) -> LiveModel:
    """Loads the base model. Raises what is wrong with it, e.g. ModelUnavailable."""
    message = wire.OpenModel(
        model_dir=spec.model_dir,
        base_model=spec.base_model,
        store_root=spec.store_root,
        account=spec.account,
        job=spec.job,
        threads=spec.threads,
        accelerator=spec.accelerator,
        max_context_length=spec.max_context_length,
        snapshot_cap_bytes=spec.snapshot_cap_bytes,
        held_graph_bytes=spec.held_graph_bytes,
        held_graph_limit_s=spec.held_graph_limit_s,
    )
    opened = await ask(engine, message, wire.ModelOpened)
    graphs.engine_started(budget_bytes=opened.held_graph_bytes)
    checkpoints = SlotCheckpoints(engine, spec, store, policy)
    return LiveModel(engine, spec, checkpoints, opened, graphs)


def pass_outcome(operation: RunPass, batch: Batch, rows: wire.Rows, arrays: wire.Arrays) -> Outcome:
    output = PassOutput(metrics=rows.metrics, arrays=batch.unpack(arrays))
    fields: Fields = {
        "loss": output.metrics.get("loss:sum", 0.0),
        "tokens": len(batch.arrays["tokens"]),
        "rows": batch.num_rows,
        "metrics": output.metrics,
        "graph": rows.graph.value,
    }
    event = "forward" if operation.body.forward_only else "forward_backward"
    return Outcome(PassResult(output), event=event, fields=fields)


def _check_allowed(operation: Operation, handle: Handle) -> None:
    if handle.kind is SlotKind.REFERENCE and _changes_weights(operation):
        raise FailedPrecondition(
            f"{handle.model_id} is a frozen reference model: it only runs forward",
            hint="create a model with create_training_client to train",
        )
    if isinstance(operation, StepOptimizer):
        check_adam(operation.adam)


def _changes_weights(operation: Operation) -> bool:
    if isinstance(operation, RunPass):
        return not operation.body.forward_only
    return not isinstance(operation, CreateHandle | UnloadHandle | Refused)
