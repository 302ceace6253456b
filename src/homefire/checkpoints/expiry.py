"""Which expired checkpoints of one job may go. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from homefire.wire.manifest import CheckpointFamily, Manifest

GRACE_S = 600.0
"""An expired checkpoint stays so long: a delta that is being written may have found its parent in
it, and a replica that began to load it may finish."""


def prunable(
    manifests: Iterable[Manifest], is_needed: Callable[[Manifest], bool], *, now: float
) -> list[Manifest]:
    """Those that expired a while ago, that nobody needs and that no snapshot which stays descends
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
