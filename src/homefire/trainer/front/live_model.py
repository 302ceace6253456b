"""The loaded model: turns operations into engine requests and their replies into results.

One object per life of the engine. It knows which slots are open there and how many steps the policy has.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from homefire.checkpoints import CheckpointStore
from homefire.trainer.front.checkpoint_paths import find_state
from homefire.trainer.front.engine_process import Engine
from homefire.trainer.front.operations import (
    CreateHandle,
    LoadTrainState,
    Operation,
    Refused,
    RunPass,
    SaveSnapshot,
    SaveTrainState,
    StepOptimizer,
    UnloadHandle,
)
from homefire.trainer.front.records import (
    FailedResult,
    Handle,
    PassResult,
    PlainResult,
    Result,
)
from homefire.trainer.front.sessions import POLICY_SLOT, Request
from homefire.trainer.front.validation import Batch, Limits, check_batch
from homefire.wire import engine as wire
from homefire.wire.engine import ExecutionPlan, SlotKind
from homefire.wire.errors import (
    ErrorRecord,
    FailedPrecondition,
    HomefireError,
    InternalError,
    InvalidArgument,
)
from homefire.wire.ids import check_name
from homefire.wire.specs import TrainerSpec
from homefire.wire.tinker import PassOutput

_PREPARE_OFF_LOOP_ABOVE = 100_000
"""Bytes of an operation."""
Answer = TypeVar("Answer")
Fields = Mapping[str, str | int | float | bool | dict[str, float] | None]


@dataclass(frozen=True)
class Outcome:
    result: Result
    discarded: bool = False
    """The accumulated gradient was thrown away."""
    event: str = ""
    """What happened, for events.jsonl."""
    fields: Fields = field(default_factory=dict[str, "str | int | float"])

    @property
    def error(self) -> ErrorRecord | None:
        return self.result.error if isinstance(self.result, FailedResult) else None


class LiveModel:
    """Not for concurrent use: the worker owns it."""

    def __init__(
        self,
        engine: Engine,
        spec: TrainerSpec,
        store: CheckpointStore,
        opened: wire.ModelOpened,
    ) -> None:
        self._engine = engine
        self._spec = spec
        self._store = store
        self._slots: set[str] = set()
        self.opened = opened
        self.step = 0
        self.limits = Limits(
            opened.vocab_size, min(opened.max_context_length, spec.max_context_length)
        )

    @property
    def engine(self) -> Engine:
        return self._engine

    async def run(self, request: Request, operation: Operation, handle: Handle) -> Outcome:
        """Never raises for what is wrong with the request: that is the outcome. May raise EngineDied."""
        try:
            return await self._run(request, operation, handle)
        except HomefireError as error:
            return await self.fail(operation, handle, error)

    async def fail(self, operation: Operation, handle: Handle, error: HomefireError) -> Outcome:
        """The request fails. A step takes the gradient with it: what follows must not step it later.

        Not so on a superseded handle, where `create_model` names what it discards.
        """
        discards = (
            isinstance(operation, StepOptimizer)
            and handle.slot == POLICY_SLOT
            and handle.superseded_by is None
            and POLICY_SLOT in self._slots
        )
        if discards:
            await self.discard_gradients()
        return Outcome(FailedResult(ErrorRecord.of(error)), discarded=discards)

    async def discard_gradients(self) -> wire.GradientsDiscarded:
        return await self._ask(wire.DiscardGradients(POLICY_SLOT), wire.GradientsDiscarded)

    async def _run(self, request: Request, operation: Operation, handle: Handle) -> Outcome:
        _check_allowed(operation, handle)
        match operation:
            case RunPass():
                return await self._run_pass(request, operation, handle)
            case StepOptimizer():
                return await self._step(operation)
            case SaveTrainState():
                return await self._save_state(operation, request)
            case SaveSnapshot():
                return await self.save_snapshot(operation)
            case LoadTrainState():
                return await self.load_state(operation, handle.model_id)
            case CreateHandle():
                return await self.create(operation, handle.model_id)
            case UnloadHandle():
                return Outcome(PlainResult({"type": "unload_model", "model_id": handle.model_id}))
            case Refused(_, error):
                raise error.exception()

    # Forward, backward, step -----------------------------------------------------------------

    async def _run_pass(self, request: Request, operation: RunPass, handle: Handle) -> Outcome:
        body = operation.body
        if request.plan is None:
            raise InternalError(f"{request.request_id} has no plan")
        if len(request.operation) > _PREPARE_OFF_LOOP_ABOVE:
            batch = await asyncio.to_thread(check_batch, body, self.limits)
        else:
            batch = check_batch(body, self.limits)
        rows, logprobs = await self._compute(operation, batch, request.plan, handle.slot)
        output = PassOutput(metrics=rows.metrics, shapes=batch.shapes, logprobs=logprobs)
        fields: Fields = {
            "loss": rows.metrics.get("loss:sum", 0.0),
            "tokens": len(batch.arrays["tokens"]),
            "rows": len(batch.shapes),
            "metrics": rows.metrics,
        }
        event = "forward" if body.forward_only else "forward_backward"
        return Outcome(PassResult(output), event=event, fields=fields)

    async def _compute(
        self, operation: RunPass, batch: Batch, plan: ExecutionPlan, slot: str
    ) -> tuple[wire.Rows, bytes]:
        body = operation.body
        kind = wire.Forward if body.forward_only else wire.ForwardBackward
        message = kind(
            slot=slot, loss_fn=body.loss_fn, loss_fn_config=body.loss_fn_config, plan=plan
        )
        reply, arrays = await self._engine.call(message, batch.arrays)
        return _expect(reply, wire.Rows), batch.unpack(arrays["logprobs"])

    async def _step(self, operation: StepOptimizer) -> Outcome:
        message = wire.OptimStep(
            slot=POLICY_SLOT, adam=operation.adam, normalization=operation.normalization
        )
        stepped = await self._ask(message, wire.Stepped)
        self.step = stepped.step
        body: dict[str, str | int | float | bool | dict[str, float] | None] = {
            "metrics": stepped.metrics,
            "step": stepped.step,
        }
        return Outcome(PlainResult(body), event="optim_step", fields={"metrics": stepped.metrics})

    # Saving and loading ----------------------------------------------------------------------

    async def _save_state(self, operation: SaveTrainState, request: Request) -> Outcome:
        name = operation.name or f"state-{request.seq:06d}"
        message = wire.SaveState(
            slot=POLICY_SLOT,
            name=check_name(name, field="path"),
            overwrite=operation.overwrite,
            metadata=operation.metadata,
            ttl_seconds=operation.ttl_seconds,
        )
        saved = await self._ask(message, wire.StateSaved)
        fields: Fields = {"name": name, "size_bytes": saved.size_bytes, "digest": saved.digest}
        result = PlainResult({"type": "save_weights", "path": name, "step": saved.step})
        return Outcome(result, event="state_saved", fields=fields)

    async def save_snapshot(self, operation: SaveSnapshot) -> Outcome:
        message = wire.SaveSampler(
            slot=POLICY_SLOT,
            identity=check_name(operation.name, field="path"),
            checkpoint_type=operation.checkpoint_type,
            metadata=operation.metadata,
            ttl_seconds=operation.ttl_seconds,
        )
        saved = await self._ask(message, wire.SamplerSaved)
        fields: Fields = {
            "identity": saved.identity,
            "kind": saved.kind,
            "parent": saved.parent,
            "size_bytes": saved.size_bytes,
            "digest": saved.digest,
            "num_changed": saved.num_changed,
            "num_elements": saved.num_elements,
            "note": saved.note,
        }
        body = {"type": "save_weights_for_sampler", "path": saved.identity, "step": saved.step}
        return Outcome(PlainResult({**body, **fields}), event="snapshot_saved", fields=fields)

    async def load_state(self, operation: LoadTrainState, model_id: str) -> Outcome:
        spec = self._spec
        directory = await asyncio.to_thread(
            find_state, self._store, operation.path, account=spec.account, job=spec.job
        )
        message = wire.LoadState(
            slot=POLICY_SLOT, directory=str(directory), with_optimizer=operation.with_optimizer
        )
        loaded = await self._ask(message, wire.StateLoaded)
        self.step = loaded.step
        fields: Fields = {
            "name": operation.path,
            "with_optimizer": operation.with_optimizer,
            "digest": loaded.digest,
        }
        body = {"type": "load_weights", "path": operation.path, "model_id": model_id}
        result = PlainResult({**body, "step": loaded.step, "digest": loaded.digest})
        return Outcome(result, event="state_loaded", fields=fields)

    # Slots -----------------------------------------------------------------------------------

    async def create(self, operation: CreateHandle, model_id: str) -> Outcome:
        discarded = await self.attach(operation)
        body: dict[str, str | int | float | bool | dict[str, float] | None] = {}
        if operation.load is not None:
            loaded = await self.load_state(operation.load, model_id)
            body.update(loaded.result.body if isinstance(loaded.result, PlainResult) else {})
        else:
            body.update({"type": "create_model", "model_id": model_id, "step": self.step})
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
        return Outcome(PlainResult(body), event="model_created", fields=fields)

    async def attach(self, operation: CreateHandle) -> wire.GradientsDiscarded:
        """Opens the slot on first use. A later handle finds live weights and no leftover gradient."""
        nothing = wire.GradientsDiscarded(num_backward_calls=0, num_loss_tokens=0)
        if operation.slot in self._slots:
            is_policy = operation.slot == POLICY_SLOT
            return await self.discard_gradients() if is_policy else nothing
        message = wire.OpenSlot(slot=operation.slot, kind=operation.kind, lora=operation.lora)
        self._note_slot(await self._ask(message, wire.SlotOpened))
        return nothing

    def _note_slot(self, opened: wire.SlotOpened) -> None:
        self._slots.add(opened.slot)
        if opened.slot == POLICY_SLOT:
            self.step = opened.step

    # Recovery --------------------------------------------------------------------------------

    async def adopt_snapshot(self, identity: str) -> None:
        await self._engine.call(wire.AdoptSnapshot(POLICY_SLOT, identity))

    async def save_recovery(self, directory: Path) -> int:
        """Bytes written."""
        message = wire.SaveRecovery(str(directory))
        return (await self._ask(message, wire.RecoverySaved)).size_bytes

    async def load_recovery(self, directory: Path) -> None:
        loaded = await self._ask(wire.LoadRecovery(str(directory)), wire.RecoveryLoaded)
        for opened in loaded.slots:
            self._note_slot(opened)

    async def _ask(self, message: wire.Request, kind: type[Answer]) -> Answer:
        reply, _ = await self._engine.call(message)
        return _expect(reply, kind)


async def open_model(engine: Engine, spec: TrainerSpec, store: CheckpointStore) -> LiveModel:
    """Loads the base model. Raises what is wrong with it, e.g. ModelUnavailable."""
    message = wire.OpenModel(
        model_dir=spec.model_dir,
        base_model=spec.base_model,
        store_root=spec.store_root,
        account=spec.account,
        job=spec.job,
        threads=spec.threads,
        max_context_length=spec.max_context_length,
        snapshot_cap_bytes=spec.snapshot_cap_bytes,
    )
    reply, _ = await engine.call(message, {})
    return LiveModel(engine, spec, store, _expect(reply, wire.ModelOpened))


def _expect(reply: wire.Reply, kind: type[Answer]) -> Answer:
    if not isinstance(reply, kind):
        raise InternalError(f"the engine answered {type(reply).__name__}, not {kind.__name__}")
    return reply


def _check_allowed(operation: Operation, handle: Handle) -> None:
    if handle.kind is SlotKind.REFERENCE and _changes_weights(operation):
        raise FailedPrecondition(
            f"{handle.model_id} is a frozen reference model: it only runs forward",
            hint="create a model with create_training_client to train",
        )
    if isinstance(operation, StepOptimizer):
        _check_adam(operation)


def _changes_weights(operation: Operation) -> bool:
    if isinstance(operation, RunPass):
        return not operation.body.forward_only
    return not isinstance(operation, CreateHandle | UnloadHandle | Refused)


def _check_adam(operation: StepOptimizer) -> None:
    adam = operation.adam
    ranges = {
        "learning_rate": (0.0, float("inf")),
        "beta1": (0.0, 1.0),
        "beta2": (0.0, 1.0),
        "eps": (0.0, float("inf")),
        "weight_decay": (0.0, float("inf")),
        "grad_clip_norm": (0.0, float("inf")),
    }
    for name, (low, below) in ranges.items():
        value = getattr(adam, name)
        if not low <= value < below:
            raise InvalidArgument(
                f"adam_params.{name} is {value}", hint=f"use {low} <= {name} < {below}", field=name
            )
