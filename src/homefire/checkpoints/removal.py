"""Deleting the checkpoints that a retention decision named: a worker's work, in their order.

What changed since the decision stays: a checkpoint that was pinned, replaced, or became a parent.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from homefire.checkpoints.open_store import open_store
from homefire.checkpoints.store import CheckpointKey, CheckpointStore
from homefire.foundation.durable import write_file
from homefire.wire.errors import ErrorRecord, HomefireError, UnknownSnapshot
from homefire.wire.manifest import CheckpointFamily


class Doomed(msgspec.Struct, frozen=True):
    """A checkpoint as it was when its end was decided."""

    key: CheckpointKey
    digest: str


class RemovalSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The JSON that the worker is started with."""

    store_root: str
    doomed: list[Doomed]
    """Children before their parents."""
    result_file: str


class RemovalResult(msgspec.Struct, frozen=True, kw_only=True):
    removed: list[CheckpointKey] = []
    spared: dict[str, str] = {}
    """Why, by key."""
    error: ErrorRecord | None = None
    """What ended the work early."""


def run_removal(spec_file: Path) -> int:
    """The worker's whole life: 0 when every checkpoint was dealt with."""
    spec = msgspec.json.decode(spec_file.read_bytes(), type=RemovalSpec)
    try:
        result = remove(open_store(spec.store_root), spec.doomed)
    except HomefireError as exc:
        result = RemovalResult(error=ErrorRecord.of(exc))
    write_file(Path(spec.result_file), msgspec.json.encode(result))
    return 0 if result.error is None else 1


def remove(store: CheckpointStore, doomed: list[Doomed]) -> RemovalResult:
    """StorageFailed when the disk refuses; what was removed by then is."""
    removed: list[CheckpointKey] = []
    spared: dict[str, str] = {}
    for item in doomed:
        reason = _reason_to_spare(store, item)
        if reason is not None:
            spared[str(item.key)] = reason
            continue
        try:
            store.delete(item.key)
        except UnknownSnapshot:
            continue  # somebody else deleted it
        removed.append(item.key)
    return RemovalResult(removed=removed, spared=spared)


def _reason_to_spare(store: CheckpointStore, item: Doomed) -> str | None:
    key = item.key
    if not store.exists(key):
        return None
    manifest = store.manifest(key)
    if manifest.digest != item.digest:
        return "it was replaced meanwhile"
    if manifest.pinned:
        return "it was pinned meanwhile"
    if key.family is not CheckpointFamily.SAMPLER:
        return None
    for other in store.summaries(key.account, key.job, slot=key.slot):
        if other.parent == key.name:
            return f"it is the parent of {other.identity!r}"
    return None
