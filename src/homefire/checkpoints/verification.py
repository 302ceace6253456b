"""Is a checkpoint still what its manifest says? Everything is read again and digested again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from homefire.checkpoints.file_digest import verify_files
from homefire.checkpoints.materialize import Held, materialize
from homefire.checkpoints.model_directory import read_model_directory
from homefire.checkpoints.safetensors_file import read_safetensors
from homefire.checkpoints.snapshots import ADAPTER_FILE
from homefire.checkpoints.states import read_state_tensors
from homefire.checkpoints.store import CheckpointKey, CheckpointStore
from homefire.wire.errors import DigestMismatch, HomefireError
from homefire.wire.manifest import CheckpointFamily, CheckpointKind, Manifest, whole_digest
from homefire.wire.tensors import Tensors, digest_tensors


@dataclass(frozen=True)
class Verified:
    manifest: Manifest
    error: HomefireError | None
    """What is wrong with it; None when every byte is as it was."""


def verify(store: CheckpointStore, manifests: Iterable[Manifest]) -> Iterator[Verified]:
    """One verdict per manifest, in their order, each as soon as it is known.

    A snapshot is materialized: files, every link of its chain, each tensor and the whole. What was
    materialized last is kept, so that a chain in the order of its making is walked once.
    """
    held: dict[str, Held] = {}
    for manifest in manifests:
        try:
            if manifest.family is CheckpointFamily.SAMPLER:
                held = {manifest.slot: _materialized(store, manifest, held.get(manifest.slot))}
            else:
                _check_tensors(manifest, _tensors(store, manifest))
        except HomefireError as error:
            yield Verified(manifest, error)
        except OSError as exc:
            yield Verified(manifest, DigestMismatch(f"{manifest.identity!r} is unreadable: {exc}"))
        else:
            yield Verified(manifest, None)


def _materialized(store: CheckpointStore, manifest: Manifest, held: Held | None) -> Held:
    m = manifest
    found = materialize(store, m.account, m.job, m.slot, m.identity, held=held)
    return Held(m.identity, found.tensors)


def _tensors(store: CheckpointStore, manifest: Manifest) -> Tensors:
    """Of a training state, or of what was written to be taken elsewhere."""
    directory = store.directory(CheckpointKey.of(manifest))
    if manifest.kind is CheckpointKind.STATE:
        return read_state_tensors(directory)
    verify_files(directory, manifest)
    if manifest.kind is CheckpointKind.LORA:
        return read_safetensors(directory / ADAPTER_FILE)
    return read_model_directory(directory)


def _check_tensors(manifest: Manifest, tensors: Tensors) -> None:
    entries = digest_tensors(tensors)
    if entries != manifest.tensors or whole_digest(entries) != manifest.digest:
        raise DigestMismatch(
            f"{manifest.kind} checkpoint {manifest.identity!r}: its tensors are not those of its"
            " manifest",
            hint="load another checkpoint",
        )
