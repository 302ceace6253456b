"""Saving and loading the checkpoints of one slot, by way of the engine."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

from homefire.checkpoints import CheckpointKey, CheckpointStore
from homefire.trainer.front.checkpoint_paths import find_state
from homefire.trainer.front.engine_process import Engine, ask, ended
from homefire.trainer.front.operations import (
    LoadAdapterWeights,
    LoadTrainState,
    SaveExternalWeights,
    SaveOperation,
    SaveSnapshot,
    SaveTrainState,
)
from homefire.trainer.front.outcome import Fields, Outcome
from homefire.trainer.front.records import Handle, PlainResult
from homefire.trainer.front.slot_policy import SlotPolicy
from homefire.wire import engine as wire
from homefire.wire.engine import LoraSpec
from homefire.wire.errors import InvalidArgument
from homefire.wire.ids import check_name
from homefire.wire.manifest import CheckpointFamily, LoraManifest, Manifest
from homefire.wire.specs import TrainerSpec


class SlotCheckpoints:
    """Raises what is wrong; then nothing has changed.

    A save has its bytes when its call returns, and is durable when what it returns was awaited.
    """

    def __init__(
        self, engine: Engine, spec: TrainerSpec, store: CheckpointStore, policy: SlotPolicy
    ) -> None:
        self._engine = engine
        self._spec = spec
        self._store = store
        self._policy = policy

    async def begin_save(
        self, operation: SaveOperation, handle: Handle, *, seq: int | None
    ) -> Awaitable[Outcome]:
        match operation:
            case SaveTrainState():
                return await self._begin_state(operation, handle, seq=seq)
            case SaveSnapshot():
                return await self._begin_snapshot(operation, handle)
            case SaveExternalWeights():
                return await self._begin_external(operation, handle)

    async def _begin_state(
        self, operation: SaveTrainState, handle: Handle, *, seq: int | None
    ) -> Awaitable[Outcome]:
        name = operation.name or f"state-{seq:06d}"
        message = wire.SaveState(
            slot=handle.slot,
            name=check_name(name, field="path"),
            overwrite=operation.overwrite,
            metadata=operation.metadata,
            ttl_seconds=operation.ttl_seconds,
        )
        return self._state_saved(await self._engine.begin(message), handle, name)

    async def _state_saved(
        self, save: Awaitable[wire.SaveReply], handle: Handle, name: str
    ) -> Outcome:
        saved = await ended(save, wire.StateSaved)
        fields: Fields = {"name": name, "size_bytes": saved.size_bytes, "digest": saved.digest}
        path = self._policy.path(handle.slot, CheckpointFamily.STATE, name)
        result = PlainResult({"type": "save_weights", "path": path, "step": saved.step})
        return Outcome(result, event="state_saved", fields=fields)

    async def _begin_snapshot(self, operation: SaveSnapshot, handle: Handle) -> Awaitable[Outcome]:
        message = wire.SaveSampler(
            slot=handle.slot,
            identity=check_name(operation.name, field="path"),
            checkpoint_type=operation.checkpoint_type,
            metadata=operation.metadata,
            ttl_seconds=operation.ttl_seconds,
        )
        return self._snapshot_saved(await self._engine.begin(message), operation, handle)

    async def _snapshot_saved(
        self, save: Awaitable[wire.SaveReply], operation: SaveSnapshot, handle: Handle
    ) -> Outcome:
        saved = await ended(save, wire.SamplerSaved)
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
        path = self._policy.path(handle.slot, CheckpointFamily.SAMPLER, saved.identity)
        answer = {"path": path}
        if operation.sampling_session_id:
            answer = {"sampling_session_id": operation.sampling_session_id}
            fields = {**fields, **answer}
        body = {"type": "save_weights_for_sampler", **answer, "step": saved.step}
        return Outcome(PlainResult({**body, **fields}), event="snapshot_saved", fields=fields)

    async def _begin_external(
        self, operation: SaveExternalWeights, handle: Handle
    ) -> Awaitable[Outcome]:
        message = wire.SaveExternal(
            slot=handle.slot,
            name=check_name(operation.name, field="path"),
            ttl_seconds=operation.ttl_seconds,
        )
        return self._external_saved(await self._engine.begin(message), handle)

    async def _external_saved(self, save: Awaitable[wire.SaveReply], handle: Handle) -> Outcome:
        saved = await ended(save, wire.ExternalSaved)
        fields: Fields = {
            "name": saved.name,
            "kind": saved.kind,
            "size_bytes": saved.size_bytes,
            "digest": saved.digest,
        }
        path = self._policy.path(handle.slot, CheckpointFamily.EXTERNAL, saved.name)
        body = {"type": "save_weights_external", "path": path, "size_bytes": saved.size_bytes}
        return Outcome(PlainResult({**body}), event="external_saved", fields=fields)

    def full_path(self, path: str, slot: str) -> str:
        """As records name a state: a bare name means nothing without its slot."""
        is_bare = "://" not in path
        return self._policy.path(slot, CheckpointFamily.STATE, path) if is_bare else path

    async def load_state(
        self, operation: LoadTrainState, handle: Handle
    ) -> tuple[wire.StateLoaded, str]:
        """With the digest of the state's files, optimizer included, by its manifest."""
        key = await asyncio.to_thread(
            find_state, self._store, operation.path, spec=self._spec, slot=handle.slot
        )
        manifest = await asyncio.to_thread(self._store.manifest, key)
        self._check_base_model(manifest, operation.path)
        _check_adapter(manifest.lora, handle.lora, operation.path)
        message = wire.LoadState(
            slot=handle.slot,
            directory=str(await asyncio.to_thread(self._store.directory, key)),
            with_optimizer=operation.with_optimizer,
        )
        return await ask(self._engine, message, wire.StateLoaded), manifest.digest

    async def load_adapter(self, operation: LoadAdapterWeights, handle: Handle) -> Outcome:
        message = wire.LoadAdapter(
            slot=handle.slot, directory=operation.directory, digest=operation.digest
        )
        loaded = await ask(self._engine, message, wire.StateLoaded)
        fields: Fields = {"name": operation.path, "with_optimizer": False, "digest": loaded.digest}
        body = {"type": "load_adapter", "model_id": handle.model_id, "step": loaded.step}
        result = PlainResult({**body, "adapter_path": operation.path, "digest": loaded.digest})
        return Outcome(result, event="adapter_loaded", fields=fields)

    async def adopt_snapshot(self, slot: str, name: str) -> bool:
        """False for a snapshot that was deleted since: it is nobody's parent any more."""
        key = CheckpointKey(
            self._spec.account, self._spec.job, slot, CheckpointFamily.SAMPLER, name
        )
        if not await asyncio.to_thread(self._store.exists, key):
            return False
        await ask(self._engine, wire.AdoptSnapshot(slot, name), wire.SamplerSaved)
        return True

    def _check_base_model(self, manifest: Manifest, path: str) -> None:
        """An adapter fits any base of the same shapes, and means something on its own alone."""
        found, wanted = manifest.base_model, self._spec.base_model
        is_foreign = manifest.job != self._spec.job and found != wanted
        if manifest.lora is not None and is_foreign:
            raise InvalidArgument(
                f"{path!r} is an adapter of {found}, this model's base is {wanted}",
                hint=f"load it into a model of {found}",
                field="path",
            )


def _check_adapter(found: LoraManifest | None, live: LoraSpec | None, path: str) -> None:
    """The engine compares shapes; a scale or a switch that differs would go unnoticed."""
    if found is None or live is None:
        return
    for name in ("rank", "alpha", "train_attn", "train_mlp", "train_unembed"):
        saved, here = getattr(found, name), getattr(live, name)
        if saved != here:
            raise InvalidArgument(
                f"{path!r} holds an adapter with {name} {saved}, this model's has {here}",
                hint="create a model from the state instead: it gets the state's adapter",
                field="path",
            )
