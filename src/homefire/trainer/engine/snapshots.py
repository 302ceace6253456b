"""Sampler snapshots of a slot: what is written, against which parent, and when twice is once."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from homefire.checkpoints import (
    CheckpointFamily,
    CheckpointKey,
    CheckpointKind,
    LoraManifest,
    Manifest,
    SnapshotInfo,
    Tensors,
    digest_tensors,
    materialize,
    resolve_chain,
    whole_digest,
    write_base,
    write_delta,
    write_lora,
)
from homefire.checkpoints.lineage import MAX_CHAIN
from homefire.trainer.engine.bucket import Bucket
from homefire.trainer.engine.canary import CanaryProbe, Logprobs
from homefire.trainer.engine.network import MergedWeights
from homefire.trainer.engine.saves import PreparedSave, already_own, num_bytes
from homefire.trainer.engine.slots import Committed, Slot
from homefire.wire.engine import (
    MERGED_BASE,
    ExternalSaved,
    LoraSpec,
    SamplerSaved,
    SaveExternal,
    SaveSampler,
)
from homefire.wire.errors import (
    DigestMismatch,
    DuplicateCheckpoint,
    FailedPrecondition,
    InvalidArgument,
    ReplayDivergence,
    UnknownSnapshot,
)

log = logging.getLogger(__name__)


def prepare_sampler(
    bucket: Bucket, slot: Slot, request: SaveSampler, probe: CanaryProbe
) -> PreparedSave[SamplerSaved]:
    """The slot's serving weights, committed and made the parent of the next delta."""
    _check_type(request.checkpoint_type)
    trained = slot.trainable()
    key = bucket.key(slot.name, CheckpointFamily.SAMPLER, request.identity)
    info = bucket.info(step=slot.step, metadata=request.metadata, ttl_seconds=request.ttl_seconds)
    if request.checkpoint_type == MERGED_BASE:
        merged = trained.merged()
        write = partial(_save_merged, bucket, key, merged, info)
        return already_own(num_bytes(merged.tensors), write)
    taken = _Taken(bucket, slot, key, trained.serving(), info, trained.adapter_config())
    scored = None if bucket.store.exists(key) else probe.score(slot)
    write = partial(_save_sampler, taken, request.checkpoint_type, probe, scored)
    return already_own(num_bytes(taken.serving), write)


def prepare_external(
    bucket: Bucket, slot: Slot, request: SaveExternal
) -> PreparedSave[ExternalSaved]:
    """The serving weights whole. The slot's chain of deltas does not notice."""
    trained = slot.trainable()
    key = bucket.key(slot.name, CheckpointFamily.EXTERNAL, request.name)
    info = bucket.info(step=slot.step, metadata=request.metadata, ttl_seconds=request.ttl_seconds)
    taken = _Taken(bucket, slot, key, trained.serving(), info, trained.adapter_config())
    return already_own(num_bytes(taken.serving), partial(_save_external, taken))


@dataclass(frozen=True)
class _Taken:
    """What a snapshot is made of, as it was when its bytes were taken."""

    bucket: Bucket
    slot: Slot
    """Only for its parent snapshot, which saves change in their order, and its name."""
    key: CheckpointKey
    serving: Tensors
    info: SnapshotInfo
    adapter_config: dict[str, Any] | None


def _save_sampler(
    taken: _Taken, checkpoint_type: str, probe: CanaryProbe, scored: Logprobs | None
) -> SamplerSaved:
    if scored is not None:
        info = replace(taken.info, canary=probe.canary(scored, taken.slot.committed))
        taken = replace(taken, info=info)
    manifest, note = _write_or_find(taken, checkpoint_type)
    taken.slot.committed = Committed(manifest, taken.serving)
    return _saved(manifest, note)


def _save_external(taken: _Taken) -> ExternalSaved:
    manifest, _ = _write_or_find(taken, "base")
    return ExternalSaved(
        name=manifest.identity,
        kind=CheckpointKind(manifest.kind).value,
        step=manifest.step,
        size_bytes=manifest.size_bytes,
        digest=manifest.digest,
    )


def _save_merged(
    bucket: Bucket, key: CheckpointKey, merged: MergedWeights, info: SnapshotInfo
) -> SamplerSaved:
    """A whole model beside the slot's own snapshots: nothing is ever a delta of it."""
    if bucket.store.exists(key):
        return _saved(_same_again(bucket.store.manifest(key), merged.tensors), "saved before")
    manifest = write_base(
        bucket.store,
        key,
        merged.tensors,
        info,
        model_files=bucket.model_dir,
        config_changes=merged.config_changes,
    )
    return _saved(manifest, "the adapter was merged into the base model")


def _write_or_find(taken: _Taken, checkpoint_type: str) -> tuple[Manifest, str]:
    """Twice is once: also when an engine whose front is gone commits it at the same time."""
    store, key = taken.bucket.store, taken.key
    if not store.exists(key):
        try:
            return _write(taken, checkpoint_type)
        except DuplicateCheckpoint:
            log.info("%s came into being meanwhile", key)
    return _same_again(store.manifest(key), taken.serving), "saved before"


def adopt_snapshot(bucket: Bucket, slot: Slot, identity: str) -> SamplerSaved:
    """Takes a committed snapshot for the slot's own, after proving that it is."""
    manifest = bucket.store.manifest(bucket.key(slot.name, CheckpointFamily.SAMPLER, identity))
    is_merged = slot.lora is not None and manifest.kind is CheckpointKind.BASE
    serving = slot.trainable().merged().tensors if is_merged else slot.weights.serving()
    digest = whole_digest(digest_tensors(serving))
    if digest != manifest.digest:
        raise ReplayDivergence(
            f"snapshot {identity!r} has digest {manifest.digest[:16]},"
            f" the replayed weights have {digest[:16]}",
            hint="the replayed run is not the one that saved it",
        )
    if not is_merged:
        slot.committed = Committed(manifest, serving)
    return _saved(manifest, "adopted")


def lora_manifest(spec: LoraSpec) -> LoraManifest:
    return LoraManifest(
        rank=spec.rank,
        alpha=spec.alpha,
        seed=spec.seed,
        train_attn=spec.train_attn,
        train_mlp=spec.train_mlp,
        train_unembed=spec.train_unembed,
    )


def _check_type(checkpoint_type: str) -> None:
    if checkpoint_type not in ("base", "delta", MERGED_BASE):
        raise InvalidArgument(
            f"checkpoint_type {checkpoint_type!r} is unknown",
            hint=f"use base, delta or {MERGED_BASE}",
            field="checkpoint_type",
        )


def _same_again(manifest: Manifest, serving: Tensors) -> Manifest:
    if whole_digest(digest_tensors(serving)) != manifest.digest:
        raise DuplicateCheckpoint(
            f"snapshot {manifest.identity!r} exists with other weights (of step {manifest.step})",
            hint="save under another name",
        )
    return manifest


def _write(taken: _Taken, checkpoint_type: str) -> tuple[Manifest, str]:
    """The manifest, and a note where what was written is not what was asked."""
    bucket, slot, key, serving, info = (
        taken.bucket,
        taken.slot,
        taken.key,
        taken.serving,
        taken.info,
    )
    config = taken.adapter_config
    if config is not None and slot.lora is not None:
        lora = lora_manifest(slot.lora)
        return write_lora(bucket.store, key, serving, info, adapter_config=config, lora=lora), ""
    if checkpoint_type == "base":
        return write_base(bucket.store, key, serving, info, model_files=bucket.model_dir), ""
    parent, why_not = _parent(bucket, slot)
    if parent is None or parent.tensors is None:
        base = write_base(bucket.store, key, serving, info, model_files=bucket.model_dir)
        return base, f"{why_not}, so a base was written"
    delta = write_delta(
        bucket.store, key, serving, info, parent=parent.manifest, parent_tensors=parent.tensors
    )
    return delta, ""


def _parent(bucket: Bucket, slot: Slot) -> tuple[Committed | None, str]:
    """The last committed snapshot with its bits; else None and the reason.

    A delta is only written on a chain that a late replica can still walk.
    """
    committed = slot.committed
    if committed is None:
        return None, "the slot has no snapshot yet"
    identity = committed.manifest.identity
    key = bucket.key(slot.name, CheckpointFamily.SAMPLER, identity)
    try:
        chain = resolve_chain(lambda name: bucket.store.manifest(key.sibling(name)), identity)
        if chain[-1].digest != committed.manifest.digest:
            return None, f"snapshot {identity!r} is not the one that this slot wrote"
        if len(chain) >= MAX_CHAIN:
            return None, f"snapshot {identity!r} has {len(chain)} links already"
        if committed.tensors is not None:
            return committed, ""
        found = materialize(bucket.store, bucket.account, bucket.job, slot.name, identity)
    except (DigestMismatch, FailedPrecondition, UnknownSnapshot) as exc:
        log.warning("falling back to a base: %s", exc)
        return None, f"the chain is broken ({exc.message})"
    return Committed(found.manifest, found.tensors), ""


def _saved(manifest: Manifest, note: str) -> SamplerSaved:
    return SamplerSaved(
        identity=manifest.identity,
        kind=CheckpointKind(manifest.kind).value,
        parent=manifest.parent,
        step=manifest.step,
        size_bytes=manifest.size_bytes,
        digest=manifest.digest,
        num_changed=manifest.num_changed,
        num_elements=manifest.num_elements,
        note=note,
    )
