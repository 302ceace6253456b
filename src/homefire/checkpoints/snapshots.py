"""Writing sampler snapshots: a base, a delta, or a LoRA adapter, each committed whole.

Every writer blocks until the snapshot is durable, and leaves nothing behind when it fails. The tensors
must not change meanwhile.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from homefire import __version__
from homefire.checkpoints.delta_file import DELTA_FILE, DeltaFileWriter
from homefire.checkpoints.delta_pieces import default_threads, encode_pieces
from homefire.checkpoints.dtypes import num_elements
from homefire.checkpoints.file_digest import file_entry
from homefire.checkpoints.model_directory import companion_files, copy_files, write_model
from homefire.checkpoints.safetensors_file import write_safetensors
from homefire.checkpoints.store import CheckpointKey, CheckpointStore
from homefire.wire.errors import DigestMismatch, InvalidArgument, SizeCapExceeded
from homefire.wire.manifest import (
    Canary,
    CheckpointFamily,
    CheckpointKind,
    FileEntry,
    LoraManifest,
    Manifest,
    TensorEntry,
    whole_digest,
)
from homefire.wire.tensors import Tensors, digest_tensors

log = logging.getLogger(__name__)
CONFIG_FILE = "config.json"
ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG_FILE = "adapter_config.json"
_NO_CHANGES: Mapping[str, Any] = {}
_WARN_ABOVE = 0.8
"""Share of the size cap from which a writer warns."""


@dataclass(frozen=True)
class SnapshotInfo:
    """What a writer puts into the manifest beside the tensors."""

    step: int
    base_model: str
    """As the client named it, e.g. `accounts/fireworks/models/qwen3-8b`."""
    created_at: float
    """Unix time in seconds."""
    metadata: dict[str, str] = field(default_factory=dict[str, str])
    expires_at: float | None = None
    cap_bytes: int = 64 << 30
    """A checkpoint above this is refused; from 80 % on a warning is logged."""
    canary: Canary | None = None


def write_base(
    store: CheckpointStore,
    key: CheckpointKey,
    tensors: Tensors,
    info: SnapshotInfo,
    *,
    model_files: Path,
    config_changes: Mapping[str, Any] = _NO_CHANGES,
) -> Manifest:
    """An ordinary Hugging Face directory: weights, and `model_files`' configuration and tokenizer.

    `config_changes` replace top-level fields of its config.json.
    """
    companions = companion_files(model_files)
    planned = _num_bytes(tensors) + sum(path.stat().st_size for path in companions)
    check_size_cap(key, planned, info.cap_bytes)
    with store.stage(key) as staged:
        files = write_model(staged.directory, tensors)
        files |= copy_files(companions, staged.directory)
        if config_changes:
            files[CONFIG_FILE] = _change_config(staged.directory / CONFIG_FILE, config_changes)
        entries = digest_tensors(tensors)
        manifest = new_manifest(
            key, CheckpointKind.BASE, info, entries, files, num_elements=_count(tensors)
        )
        staged.commit(manifest)
    return manifest


def write_delta(
    store: CheckpointStore,
    key: CheckpointKey,
    tensors: Tensors,
    info: SnapshotInfo,
    *,
    parent: Manifest,
    parent_tensors: Tensors,
) -> Manifest:
    """Only the bits in which `tensors` differ from `parent_tensors`, which are snapshot `parent`.

    InvalidArgument when names, dtypes or shapes differ: then a base is needed. DigestMismatch when
    `parent_tensors` turn out not to be the parent.
    """
    _check_same_layout(key, tensors, parent)
    entries = digest_tensors(tensors)
    with store.stage(key) as staged:
        path = staged.directory / DELTA_FILE
        written, num_changed = _write_changes(
            path, key, tensors, entries, parent, parent_tensors, info.cap_bytes
        )
        manifest = new_manifest(
            key,
            CheckpointKind.DELTA,
            info,
            entries,
            {DELTA_FILE: written},
            num_elements=_count(tensors),
            parent=parent.identity,
            parent_digest=parent.digest,
            num_changed=num_changed,
        )
        staged.commit(manifest)
    return manifest


def write_lora(
    store: CheckpointStore,
    key: CheckpointKey,
    tensors: Tensors,
    info: SnapshotInfo,
    *,
    adapter_config: dict[str, Any],
    lora: LoraManifest,
) -> Manifest:
    """An ordinary PEFT directory; `adapter_config` is its `adapter_config.json`."""
    check_size_cap(key, _num_bytes(tensors), info.cap_bytes)
    with store.stage(key) as staged:
        weights, config = staged.directory / ADAPTER_FILE, staged.directory / ADAPTER_CONFIG_FILE
        files = {ADAPTER_FILE: write_safetensors(weights, tensors, {"format": "pt"})}
        config.write_bytes(msgspec.json.format(msgspec.json.encode(adapter_config), indent=2))
        files[ADAPTER_CONFIG_FILE] = file_entry(config)
        entries = digest_tensors(tensors)
        manifest = new_manifest(
            key, CheckpointKind.LORA, info, entries, files, num_elements=_count(tensors), lora=lora
        )
        staged.commit(manifest)
    return manifest


def new_manifest(
    key: CheckpointKey,
    kind: CheckpointKind,
    info: SnapshotInfo,
    tensors: dict[str, TensorEntry],
    files: Mapping[str, FileEntry],
    *,
    num_elements: int,
    num_changed: int = 0,
    parent: str | None = None,
    parent_digest: str | None = None,
    lora: LoraManifest | None = None,
) -> Manifest:
    return Manifest(
        identity=key.name,
        kind=kind,
        account=key.account,
        job=key.job,
        slot=key.slot,
        step=info.step,
        parent=parent,
        parent_digest=parent_digest,
        base_model=info.base_model,
        created_at=info.created_at,
        tensors=tensors,
        digest=whole_digest(tensors),
        files=dict(files),
        size_bytes=sum(entry.size_bytes for entry in files.values()),
        num_changed=num_changed,
        num_elements=num_elements,
        lora=lora,
        canary=info.canary,
        expires_at=info.expires_at,
        metadata=info.metadata,
        homefire_version=__version__,
        external=key.family is CheckpointFamily.EXTERNAL,
    )


def check_size_cap(key: CheckpointKey, size_bytes: int, cap_bytes: int) -> None:
    """Before anything is committed: refuses above the cap, warns from 80 % of it on."""
    if size_bytes > cap_bytes:
        raise SizeCapExceeded(
            f"{key.family} checkpoint {key.name!r} would have {size_bytes} bytes, "
            f"the cap is {cap_bytes}",
            hint="save deltas or an adapter, or raise the job's snapshot cap",
        )
    if size_bytes >= _WARN_ABOVE * cap_bytes:
        share = size_bytes / cap_bytes
        log.warning("%s has %d bytes, %.0f %% of the cap", key, size_bytes, 100 * share)


def _change_config(path: Path, changes: Mapping[str, Any]) -> FileEntry:
    config = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    path.write_bytes(msgspec.json.format(msgspec.json.encode(config | dict(changes)), indent=2))
    return file_entry(path)


def _num_bytes(tensors: Tensors) -> int:
    return sum(tensor.data.nbytes for tensor in tensors.values())


def _count(tensors: Tensors) -> int:
    return sum(map(num_elements, tensors.values()))


def _check_same_layout(key: CheckpointKey, tensors: Tensors, parent: Manifest) -> None:
    new = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    old = {name: (entry.dtype, entry.shape) for name, entry in parent.tensors.items()}
    if new != old:
        name = min(dict(new.items() ^ old.items()))
        raise InvalidArgument(
            f"{key.name!r} cannot be a delta of {parent.identity!r}: tensor {name!r} is "
            f"{new.get(name, 'absent')}, was {old.get(name, 'absent')}",
            hint="save a base",
        )


def _write_changes(
    path: Path,
    key: CheckpointKey,
    tensors: Tensors,
    entries: Mapping[str, TensorEntry],
    parent: Manifest,
    parent_tensors: Tensors,
    cap_bytes: int,
) -> tuple[FileEntry, int]:
    """The file, and how many elements changed. Pieces are written as they are encoded."""
    for name, tensor in tensors.items():
        old = parent_tensors.get(name)
        if old is None or old.data.nbytes != tensor.data.nbytes:
            raise _not_the_parent(parent, name)
    changed: dict[str, tuple[str, str]] = {}
    with DeltaFileWriter(path, tensors) as file:
        for piece in encode_pieces(parent_tensors, tensors, threads=default_threads()):
            file.add(piece)
        check_size_cap(key, file.size_bytes, cap_bytes)
        for name, entry in entries.items():
            digests = parent.tensors[name].digest, entry.digest
            if (file.num_changed(name) == 0) != (digests[0] == digests[1]):
                raise _not_the_parent(parent, name)
            if file.num_changed(name):
                changed[name] = digests
        written = file.finish(changed)
        return written, sum(map(file.num_changed, changed))


def _not_the_parent(parent: Manifest, name: str) -> DigestMismatch:
    return DigestMismatch(
        f"the tensors given as snapshot {parent.identity!r} are not that snapshot: {name!r} differs",
        hint="save a base",
    )
