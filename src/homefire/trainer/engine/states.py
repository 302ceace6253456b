"""Training states in the store: masters and optimizer of one slot, and taking them back."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from homefire.checkpoints import (
    CheckpointFamily,
    CheckpointKey,
    CheckpointStore,
    LoraManifest,
    Manifest,
    SnapshotInfo,
    Tensors,
    digest_tensors,
    read_state,
    whole_digest,
    write_state,
)
from homefire.trainer.engine.bucket import Bucket
from homefire.trainer.engine.saves import PreparedSave, num_bytes, owned
from homefire.trainer.engine.slots import Slot
from homefire.trainer.engine.snapshots import lora_manifest
from homefire.wire.engine import LoadState, SaveState, StateLoaded, StateSaved
from homefire.wire.errors import DuplicateCheckpoint, InvalidArgument

WEIGHTS_FILE = "weights.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"


def prepare_state(bucket: Bucket, slot: Slot, request: SaveState) -> PreparedSave[StateSaved]:
    """Committed as `state/<name>`. The same state again under its name succeeds; another is refused
    unless `overwrite`."""
    held = slot.trainable().files()
    key = bucket.key(slot.name, CheckpointFamily.STATE, request.name)
    info = bucket.info(step=slot.step, metadata=request.metadata, ttl_seconds=request.ttl_seconds)
    lora = lora_manifest(slot.lora) if slot.lora else None

    def write(masters: Tensors, optimizer: Tensors) -> StateSaved:
        files = {WEIGHTS_FILE: masters, OPTIMIZER_FILE: optimizer}
        return _save(bucket.store, key, files, info, lora, overwrite=request.overwrite)

    return PreparedSave(
        num_bytes(held.masters, held.optimizer),
        write=partial(write, held.masters, held.optimizer),
        keep=lambda: partial(write, owned(held.masters), owned(held.optimizer)),
    )


def _save(
    store: CheckpointStore,
    key: CheckpointKey,
    files: dict[str, Tensors],
    info: SnapshotInfo,
    lora: LoraManifest | None,
    *,
    overwrite: bool,
) -> StateSaved:
    if store.exists(key) and not overwrite:
        manifest = _same_again(store.manifest(key), files)
    else:
        manifest = write_state(store, key, files, info, overwrite=overwrite, lora=lora)
    return StateSaved(
        name=key.name,
        step=manifest.step,
        size_bytes=manifest.size_bytes,
        digest=manifest.digest,
    )


def load_state(slot: Slot, request: LoadState) -> StateLoaded:
    """Weights, and the optimizer or a fresh one; clears accumulated gradients.

    Keeps the slot's parent snapshot: a delta codes bits, so it stays right whatever was loaded.
    The reply's digest is that of the serving weights.
    """
    trained = slot.trainable()
    manifest, files = read_state(Path(request.directory))
    _check_same_kind(slot, manifest)
    trained.check_fits(files[WEIGHTS_FILE])
    optimizer = files[OPTIMIZER_FILE] if request.with_optimizer else None
    trained.restore(files[WEIGHTS_FILE], optimizer, {})
    slot.clear_gradient()
    slot.step = manifest.step
    return StateLoaded(step=slot.step, digest=serving_digest(slot))


def serving_digest(slot: Slot) -> str:
    return whole_digest(digest_tensors(slot.weights.serving()))


def _same_again(manifest: Manifest, files: dict[str, Tensors]) -> Manifest:
    flat = {f"{file}:{name}": t for file, tensors in files.items() for name, t in tensors.items()}
    if whole_digest(digest_tensors(flat)) != manifest.digest:
        raise DuplicateCheckpoint(
            f"state {manifest.identity!r} exists with other content (of step {manifest.step})",
            hint="save under another name, or with overwrite",
        )
    return manifest


def _check_same_kind(slot: Slot, manifest: Manifest) -> None:
    found = f"LoRA of rank {manifest.lora.rank}" if manifest.lora else "all parameters"
    wanted = f"LoRA of rank {slot.lora.rank}" if slot.lora else "all parameters"
    if found != wanted:
        raise InvalidArgument(
            f"state {manifest.identity!r} holds {found}, this model trains {wanted}",
            hint="load it into a model of the same kind and rank",
            field="path",
        )
