"""The verbs of an engine over named slots: all that the torch and the fake engine share.

A forward_backward reads like this: check the batch whole, cut it as the plan says, push each
micro-batch through the network (which asks back for the loss's derivative), keep the gradient only
when every micro-batch went well.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypedDict

import msgspec

from homefire.checkpoints import open_store
from homefire.foundation.clock import Clock, SystemClock
from homefire.trainer.engine import (
    adapters,
    embedding_passes,
    packed_passes,
    recovery,
    snapshots,
    states,
    target_passes,
)
from homefire.trainer.engine.batch import Batch, read_batch, read_tokens
from homefire.trainer.engine.bucket import Bucket
from homefire.trainer.engine.canary import CanaryProbe
from homefire.trainer.engine.held_graphs import HeldPasses, budget_of
from homefire.trainer.engine.losses import (
    Loss,
    evaluate,
    is_per_token,
    loss_function,
    metrics,
)
from homefire.trainer.engine.network import Network, TrainableWeights
from homefire.trainer.engine.saves import PreparedSave
from homefire.trainer.engine.second_try import Replan, with_second_try
from homefire.trainer.engine.slots import Committed, Slot, Slots
from homefire.wire.engine import (
    AdoptSnapshot,
    Arrays,
    CloseSlot,
    Digest,
    DiscardGradients,
    Done,
    ExecutionPlan,
    Forward,
    ForwardBackward,
    GradientsDiscarded,
    LoadAdapter,
    LoadRecovery,
    LoadState,
    LoraSpec,
    ModelOpened,
    OpenModel,
    OpenSlot,
    OptimStep,
    PackedForwardBackward,
    RecoveryLoaded,
    Rows,
    RowsByMember,
    SamplerSaved,
    SaveExternal,
    SaveRecovery,
    SaveReply,
    SaveRequest,
    SaveSampler,
    SaveState,
    SlotKind,
    SlotOpened,
    StateLoaded,
    Stepped,
    WeightsDigest,
    by_member,
    check_adam,
    of_member,
)
from homefire.wire.errors import (
    DigestMismatch,
    FailedPrecondition,
    InvalidArgument,
    NonFiniteGradient,
)
from homefire.wire.graphs import GraphFate, GraphUse
from homefire.wire.ids import check_name
from homefire.wire.pass_extras import EmbeddingPass, PassExtras, read_extras

log = logging.getLogger(__name__)
OpenNetwork = Callable[[OpenModel], Network]


class Bounds(TypedDict):
    """What a row's tokens must stay within."""

    vocab_size: int
    max_context_length: int


@dataclass(frozen=True)
class _Opened:
    network: Network
    bucket: Bucket
    held: HeldPasses
    max_context_length: int
    canary: CanaryProbe


class SlotEngine:
    """Implements `TrainingEngine` over a `Network`. One thread."""

    def __init__(self, open_network: OpenNetwork, *, clock: Clock | None = None) -> None:
        self._open_network = open_network
        self._clock = clock or SystemClock()
        self._slots = Slots()
        self._opened: _Opened | None = None

    # Opening -------------------------------------------------------------------------------------

    def open_model(self, request: OpenModel) -> ModelOpened:
        if self._opened is not None:
            raise FailedPrecondition("this engine has its model already")
        network = self._open_network(request)
        bucket = Bucket(
            store=open_store(request.store_root, self._clock),
            account=request.account,
            job=request.job,
            base_model=request.base_model,
            model_dir=Path(request.model_dir),
            cap_bytes=request.snapshot_cap_bytes,
            clock=self._clock,
        )
        limit = min(request.max_context_length, network.max_context_length)
        held = HeldPasses(
            budget_bytes=budget_of(request.held_graph_bytes, network.memory_bytes),
            limit_s=request.held_graph_limit_s,
            clock=self._clock,
            available_bytes=network.available_bytes,
        )
        self._opened = _Opened(network, bucket, held, limit, CanaryProbe(network, limit))
        return ModelOpened(
            architecture=network.architecture,
            vocab_size=network.vocab_size,
            max_context_length=limit,
            num_parameters=network.num_parameters,
            pid=os.getpid(),
            held_graph_bytes=held.budget_bytes,
            pass_budget=network.pass_budget(),
        )

    def open_slot(self, request: OpenSlot) -> SlotOpened:
        name = check_name(request.slot, field="slot")
        self._slots.require_free(name)
        self._held.make_way()
        slot = self._fresh_slot(name, request.kind, request.lora)
        self._slots.add(slot)
        return slot.opened()

    def close_slot(self, request: CloseSlot) -> Done:
        self._about_to_change(request.slot)
        slot = self._slots.pop(request.slot)
        self._close([slot])
        return Done()

    # Computing -----------------------------------------------------------------------------------

    def forward(self, request: Forward, arrays: Arrays) -> tuple[Rows, Arrays]:
        slot = self._slots.get(request.slot)
        extras = _extras(request, arrays, forward_only=True)
        self._use(request.plan)
        if extras.embedding is not None:
            rows = read_tokens(arrays, **self._bounds)
            found = embedding_passes.forward(slot.weights, rows, request.plan, extras.embedding)
            return self._told(Rows(metrics=found[0])), found[1]
        loss = loss_function(request.loss_fn, extras.loss_config)
        batch = read_batch(arrays, **self._bounds)
        logprobs, fate = target_passes.forward(slot, batch, request.plan, self._held)
        reply: Arrays = {"logprobs": logprobs}
        if extras.top_k is not None:
            reply |= self._likeliest(slot, batch, request.plan, extras.top_k)
        rows = Rows(metrics=metrics(evaluate(loss, logprobs, batch)))
        return self._told(rows, fate), reply

    def forward_backward(self, request: ForwardBackward, arrays: Arrays) -> tuple[Rows, Arrays]:
        slot = self._slots.get(request.slot)
        trained = slot.trainable()
        extras = _extras(request, arrays, forward_only=False)
        self._use(request.plan)

        def attempt(replan: Replan) -> tuple[Rows, Arrays]:
            asked = msgspec.structs.replace(request, plan=replan(request.plan))
            try:
                if extras.embedding is not None:
                    return self._embedding_backward(slot, trained, asked, arrays, extras.embedding)
                loss = loss_function(asked.loss_fn, extras.loss_config)
                return self._backward(slot, trained, asked, loss, arrays)
            finally:
                trained.drop_gradient()

        return with_second_try(attempt, self._network, self._held)

    def _backward(
        self,
        slot: Slot,
        trained: TrainableWeights,
        request: ForwardBackward,
        loss: Loss,
        arrays: Arrays,
    ) -> tuple[Rows, Arrays]:
        batch, plan = read_batch(arrays, **self._bounds), request.plan
        if is_per_token(request.loss_fn) and plan.graph is not GraphUse.REUSE:
            self._held.make_way()
            logprobs = target_passes.fused_backward(trained, batch, plan, loss)
            fate = GraphFate.FREED
        else:
            logprobs, fate = target_passes.backward(
                slot.name, trained, batch, plan, loss, self._held
            )
        rows, reply = packed_passes.keep(slot, evaluate(loss, logprobs, batch), batch, logprobs)
        return self._told(rows, fate), reply

    def forward_backward_packed(
        self, request: PackedForwardBackward, arrays: Arrays
    ) -> tuple[RowsByMember, Arrays]:
        packed_passes.check_slots([self._slots.get(asked.slot) for asked in request.members])
        self._held.make_way()
        self._use(request.members[0].plan)

        def attempt(replan: Replan) -> list[packed_passes.MemberReply]:
            asked = [msgspec.structs.replace(m, plan=replan(m.plan)) for m in request.members]
            members = [
                packed_passes.or_failure(partial(self._member, one, of_member(number, arrays)))
                for number, one in enumerate(asked)
            ]
            return packed_passes.backward(self._network, members)

        replies = with_second_try(attempt, self._network, self._held)
        rows = RowsByMember(members=[reply for reply, _ in replies])
        return rows, by_member([found for _, found in replies])

    def _member(self, request: ForwardBackward, arrays: Arrays) -> packed_passes.Member:
        extras = _extras(request, arrays, forward_only=False)
        if extras.embedding is not None:
            raise InvalidArgument("passes that end in embeddings are not packed", field="members")
        if request.plan.graph is not GraphUse.NONE:
            raise InvalidArgument("passes that reuse a graph are not packed", field="members")
        loss = loss_function(request.loss_fn, extras.loss_config)
        batch = read_batch(arrays, **self._bounds)
        return packed_passes.member(self._slots.get(request.slot), request, loss, batch)

    def _embedding_backward(
        self,
        slot: Slot,
        trained: TrainableWeights,
        request: ForwardBackward,
        arrays: Arrays,
        asked: EmbeddingPass,
    ) -> tuple[Rows, Arrays]:
        batch = read_tokens(arrays, **self._bounds)
        measured, reply, gradient = embedding_passes.backward(
            trained, batch, request.plan, asked, arrays
        )
        counts = embedding_passes.num_loss_tokens(gradient, batch, asked.pooling)
        slot.keep_gradient(*counts)
        return self._told(Rows(metrics=measured)), reply

    def _likeliest(self, slot: Slot, batch: Batch, plan: ExecutionPlan, count: int) -> Arrays:
        if count > self._network.vocab_size:
            raise InvalidArgument(
                f"top_k is {count}, the vocabulary has {self._network.vocab_size}", field="top_k"
            )
        logprobs, tokens = target_passes.likeliest(slot.weights, batch, plan, count)
        return {"top_k_logprobs": logprobs, "top_k_indices": tokens}

    def optim_step(self, request: OptimStep) -> Stepped:
        slot = self._about_to_change(request.slot)
        trained = slot.trainable()
        check_adam(request.adam)
        accumulated = slot.accumulated
        started = self._clock.monotonic()
        try:
            norms = trained.step(
                request.adam, accumulated.divisor(request.normalization), request.norm_metrics
            )
        except NonFiniteGradient:
            slot.clear_gradient()
            raise
        slot.clear_gradient()
        slot.step += 1
        return Stepped(
            step=slot.step,
            metrics={
                **norms,
                "learning_rate": request.adam.learning_rate,
                "num_loss_tokens": float(accumulated.num_loss_tokens),
                "num_sequences": float(accumulated.num_sequences),
                "num_backward_calls": float(accumulated.num_backward_calls),
            },
            seconds=self._clock.monotonic() - started,
        )

    def discard_gradients(self, request: DiscardGradients) -> GradientsDiscarded:
        slot = self._about_to_change(request.slot)
        dropped = slot.accumulated
        slot.clear_gradient()
        return GradientsDiscarded(
            num_backward_calls=dropped.num_backward_calls,
            num_loss_tokens=dropped.num_loss_tokens,
        )

    # Saving and loading --------------------------------------------------------------------------

    def prepare_save(self, request: SaveRequest) -> PreparedSave[SaveReply]:
        match request:
            case SaveRecovery():
                return recovery.prepare_recovery(Path(request.directory), self._slots.all())
            case SaveSampler():
                slot = self._slots.get(request.slot)
                return snapshots.prepare_sampler(self._bucket, slot, request, self._model.canary)
            case SaveExternal():
                prepare = snapshots.prepare_external
                return prepare(self._bucket, self._slots.get(request.slot), request)
            case SaveState():
                prepare = states.prepare_state
                return prepare(self._bucket, self._slots.get(request.slot), request)

    def adopt_snapshot(self, request: AdoptSnapshot) -> SamplerSaved:
        slot = self._slots.get(request.slot)
        return snapshots.adopt_snapshot(self._bucket, slot, request.identity)

    def load_state(self, request: LoadState) -> StateLoaded:
        return states.load_state(self._about_to_change(request.slot), request)

    def load_adapter(self, request: LoadAdapter) -> StateLoaded:
        return adapters.load_adapter(self._about_to_change(request.slot), request)

    def load_recovery(self, request: LoadRecovery) -> RecoveryLoaded:
        """Opens every slot of the recovery point, or none of them."""
        if self._slots.all():
            raise FailedPrecondition("a recovery point is loaded before any slot is opened")
        directory = Path(request.directory)
        record = recovery.read_recovery(directory)
        restored: list[Slot] = []
        try:
            for saved in record.slots:
                slot = self._fresh_slot(saved.name, saved.kind, saved.lora)
                restored.append(slot)
                _restore(slot, directory, record, saved)
        except (InvalidArgument, KeyError) as exc:
            self._close(restored)
            raise DigestMismatch(f"{directory} does not fit this model: {exc}") from exc
        for slot in restored:
            self._slots.add(slot)
        return RecoveryLoaded(slots=[slot.opened() for slot in restored])

    def weights_digest(self, request: WeightsDigest) -> Digest:
        slot = self._slots.get(request.slot)
        return Digest(digest=states.serving_digest(slot), step=slot.step)

    def free_expired(self) -> float | None:
        return self._opened.held.free_expired() if self._opened else None

    # Helpers -------------------------------------------------------------------------------------

    @property
    def _model(self) -> _Opened:
        if self._opened is None:
            raise FailedPrecondition("open_model comes first")
        return self._opened

    @property
    def _network(self) -> Network:
        return self._model.network

    @property
    def _bucket(self) -> Bucket:
        return self._model.bucket

    @property
    def _held(self) -> HeldPasses:
        return self._model.held

    def _about_to_change(self, name: str) -> Slot:
        """A slot whose weights or gradient are no longer what kept graphs were computed for."""
        slot = self._slots.get(name)
        self._held.free_slot(name)
        return slot

    def _told(self, rows: Rows, graph: GraphFate = GraphFate.FREED) -> Rows:
        return msgspec.structs.replace(rows, graph=graph, held=self._held.held)

    def _fresh_slot(self, name: str, kind: SlotKind, lora: LoraSpec | None) -> Slot:
        if (kind is SlotKind.LORA) != (lora is not None):
            raise InvalidArgument(f"a {kind} slot and lora={lora} do not go together", field="lora")
        if kind is SlotKind.REFERENCE:
            reference = self._network.reference()
            self._model.canary.note_base(reference)
            return Slot(name, kind, None, reference, None)
        if lora is None:
            weights = self._network.open_full()
        else:
            lora = lora if lora.seed is not None else msgspec.structs.replace(lora, seed=0)
            weights = self._network.open_lora(lora)
        self._model.canary.note_base(weights)
        shares = self._network.shares_passes(weights)
        return Slot(name, kind, lora, weights, weights, shares_passes=shares)

    def _close(self, slots: list[Slot]) -> None:
        for slot in slots:
            if slot.trained is not None:
                self._network.close(slot.trained)

    @property
    def _bounds(self) -> Bounds:
        opened = self._model
        limit = opened.max_context_length
        return {"vocab_size": opened.network.vocab_size, "max_context_length": limit}

    def _use(self, plan: ExecutionPlan) -> None:
        self._network.use_threads(plan.threads)


def _extras(
    request: Forward | ForwardBackward, arrays: Arrays, *, forward_only: bool
) -> PassExtras:
    return read_extras(
        request.loss_fn,
        request.loss_fn_config,
        num_rows=len(arrays.get("lengths", ())),
        forward_only=forward_only,
    )


def _restore(
    slot: Slot,
    directory: Path,
    record: recovery.RecoveryRecord,
    saved: recovery.SlotRecord,
) -> None:
    slot.step = saved.step
    slot.committed = Committed(saved.parent, None) if saved.parent else None
    if slot.trained is None:
        return
    masters, optimizer, gradient = (
        recovery.read_part(directory, record, saved.name, part)
        for part in ("masters", "optimizer", "gradient")
    )
    slot.trained.check_fits(masters)
    slot.trained.restore(masters, optimizer, gradient)
    slot.accumulated = saved.accumulated()
