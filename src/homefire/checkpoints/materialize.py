"""From an identity to verified tensors: read the chain, check each link, apply, check the result."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from homefire.checkpoints.delta_file import DELTA_FILE, read_delta_file
from homefire.checkpoints.delta_pieces import default_threads
from homefire.checkpoints.file_digest import verify_files
from homefire.checkpoints.lineage import resolve_chain
from homefire.checkpoints.model_directory import read_model_directory
from homefire.checkpoints.progress import Report, unreported
from homefire.checkpoints.safetensors_file import read_safetensors
from homefire.checkpoints.snapshots import ADAPTER_FILE
from homefire.checkpoints.store import CheckpointKey, CheckpointStore
from homefire.wire.errors import DigestMismatch
from homefire.wire.manifest import (
    CheckpointFamily,
    CheckpointKind,
    Manifest,
    TensorEntry,
    whole_digest,
)
from homefire.wire.tensors import RawTensor, Tensors, tensor_digest

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Held:
    """A snapshot that the caller has in memory; deltas of it need no older link."""

    identity: str
    tensors: Tensors


@dataclass(frozen=True)
class Materialized:
    manifest: Manifest
    tensors: dict[str, RawTensor]
    """The full tensors of the snapshot, or the adapter's for a LoRA; may view files or `Held`."""
    chain: list[str]
    """Identities applied, in order; empty when the snapshot was held."""


def materialize(
    store: CheckpointStore,
    account: str,
    job: str,
    slot: str,
    identity: str,
    *,
    held: Held | None = None,
    report: Report = unreported,
) -> Materialized:
    """The tensors of a snapshot, every digest checked. `held` is read, never changed.

    A file is verified before it is read, a base tensor before a delta is applied to it, and each
    tensor of the result and the whole at the end: DigestMismatch names tensor and snapshot. When what
    is held is not what it claims to be, the snapshot is read from the store alone.
    """
    key = CheckpointKey(account, job, slot, CheckpointFamily.SAMPLER, identity)
    if held is None:
        return _materialize(store, key, None, report)
    try:
        return _materialize(store, key, held, report)
    except DigestMismatch as exc:
        log.warning("reading %s from the store alone: %s", key, exc)
        return _materialize(store, key, None, report)


def _materialize(
    store: CheckpointStore, key: CheckpointKey, held: Held | None, report: Report
) -> Materialized:
    chain = resolve_chain(
        lambda name: store.manifest(key.sibling(name)),
        key.name,
        held=held.identity if held else None,
    )
    manifest = chain[-1] if chain else store.manifest(key)
    weights = _Weights(held.tensors if held else {})
    for number, link in enumerate(chain):
        report("reading the chain", number, len(chain))
        weights.advance(link, store.directory(key.sibling(link.identity)))
    report("checking digests", 0, 1)
    weights.verify(manifest)
    return Materialized(manifest, weights.tensors, [link.identity for link in chain])


class _Weights:
    """Tensors on their way along a chain, each version of each hashed once."""

    def __init__(self, tensors: Tensors) -> None:
        self.tensors = dict(tensors)
        self._digests: dict[str, str] = {}

    def advance(self, link: Manifest, directory: Path) -> None:
        verify_files(directory, link)
        if link.kind is CheckpointKind.DELTA:
            self._apply(link, directory)
            return
        self._digests.clear()
        if link.kind is CheckpointKind.LORA:
            self.tensors = read_safetensors(directory / ADAPTER_FILE)
        else:
            self.tensors = read_model_directory(directory)

    def verify(self, manifest: Manifest) -> None:
        if whole_digest(manifest.tensors) != manifest.digest:
            raise _mismatch(manifest, "its digest is not that of its tensors")
        for name in sorted(self.tensors.keys() | manifest.tensors.keys()):
            found, expected = self._entry(name), manifest.tensors.get(name)
            if found != expected:
                raise _mismatch(manifest, f"tensor {name!r} is {found}, not {expected}")

    def _apply(self, delta: Manifest, directory: Path) -> None:
        file = read_delta_file(directory / DELTA_FILE)
        for name, header in file.deltas.items():
            if name not in self.tensors or self._digest(name) != header.base_digest:
                raise _mismatch(delta, f"tensor {name!r} is not the one that it was made from")
        for name, header in file.deltas.items():
            self.tensors[name] = file.apply(name, self.tensors[name], threads=default_threads())
            self._digests.pop(name)
            if self._digest(name) != header.result_digest:
                raise _mismatch(delta, f"tensor {name!r} came out with another digest")

    def _entry(self, name: str) -> TensorEntry | None:
        tensor = self.tensors.get(name)
        if tensor is None:
            return None
        return TensorEntry(tensor.dtype, tuple(tensor.shape), self._digest(name))

    def _digest(self, name: str) -> str:
        if name not in self._digests:
            self._digests[name] = tensor_digest(self.tensors[name])
        return self._digests[name]


def _mismatch(manifest: Manifest, reason: str) -> DigestMismatch:
    return DigestMismatch(
        f"snapshot {manifest.identity!r}: {reason}",
        hint="save a base; until then load another snapshot",
    )
