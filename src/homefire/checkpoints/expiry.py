"""Which expired checkpoints of one job may go."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from homefire.checkpoints.store import CheckpointKey, CheckpointStore
from homefire.wire.errors import UnknownSnapshot
from homefire.wire.manifest import CheckpointFamily, Manifest

GRACE_S = 600.0
"""An expired checkpoint stays so long: a delta that is being written may have found its parent in
it, and a replica that began to load it may finish."""


def delete_prunable(
    store: CheckpointStore,
    manifests: Iterable[Manifest],
    is_needed: Callable[[Manifest], bool],
    *,
    now: float,
) -> Iterator[CheckpointKey]:
    """Deletes them one by one, each looked at again before: of one job, as `prunable` has it."""
    for manifest in prunable(manifests, is_needed, now=now):
        key = CheckpointKey.of(manifest)
        try:
            if not store.manifest(key).has_expired(now):
                return  # it was given more time, so what it descends from stays too
            store.delete(key)
        except UnknownSnapshot:
            continue  # somebody else deleted it
        yield key


def prunable(
    manifests: Iterable[Manifest], is_needed: Callable[[Manifest], bool], *, now: float
) -> list[Manifest]:
    """Pure. Those that expired a while ago, that nobody needs and that no snapshot which stays descends
    from.

    `manifests` are all of one job. Children come before their parents, so that a deletion that is
    interrupted leaves whole chains.
    """
    staying = list(manifests)
    ended = [m for m in staying if m.has_expired(now - GRACE_S) and not is_needed(m)]
    going: list[Manifest] = []
    while True:
        parents = {(m.slot, m.parent) for m in staying if m.parent is not None}
        leaves = [m for m in ended if not (_is_snapshot(m) and _name(m) in parents)]
        if not leaves:
            return going
        going += leaves
        ended = [m for m in ended if m not in leaves]
        staying = [m for m in staying if m not in leaves]


def _is_snapshot(manifest: Manifest) -> bool:
    """Only snapshots have descendants; a state may share a snapshot's name."""
    return manifest.family is CheckpointFamily.SAMPLER


def _name(manifest: Manifest) -> tuple[str, str]:
    return manifest.slot, manifest.identity
