"""Which snapshots lead to which: a delta's parents, back to something that stands by itself."""

from __future__ import annotations

from collections.abc import Callable

from homefire.wire.errors import (
    DigestMismatch,
    FailedPrecondition,
    UnknownSnapshot,
    WrongCheckpointKind,
)
from homefire.wire.manifest import CheckpointKind, Manifest

MAX_CHAIN = 1000
"""Deltas between a snapshot and its base; beyond, loading costs more than a base would."""


def resolve_chain(
    manifest_of: Callable[[str], Manifest], identity: str, *, held: str | None = None
) -> list[Manifest]:
    """The snapshots to apply for `identity`, in order of application.

    Walks parents until it meets `held` (what the caller has in memory; left out of the chain, which
    is empty when it is `identity` itself) or a base or an adapter, which comes first in the chain.

        resolve_chain(of, "9")              -> [base 5, delta 7, delta 9]
        resolve_chain(of, "9", held="5")    -> [delta 7, delta 9]

    UnknownSnapshot names a missing link and who needs it, DigestMismatch a link that is no longer the
    parent that the delta was made from.
    """
    chain: list[Manifest] = []
    wanted = identity
    while wanted != held:
        manifest = _link(manifest_of, wanted, chain)
        chain.append(manifest)
        if manifest.kind is not CheckpointKind.DELTA:
            break
        wanted = _parent_of(manifest)
        if len(chain) > MAX_CHAIN or any(link.identity == wanted for link in chain):
            raise FailedPrecondition(
                f"the parents of snapshot {identity!r} reach no base within {MAX_CHAIN} deltas",
                hint="save a base",
            )
    return chain[::-1]


def check_stands_alone(manifest: Manifest) -> None:
    """FailedPrecondition for what is no weights without its parents."""
    if manifest.kind is CheckpointKind.DELTA:
        raise FailedPrecondition(
            f"snapshot {manifest.identity!r} is a delta of {manifest.parent!r}: alone it is no weights",
            hint="save a base (checkpoint_type base), or use save_weights_external",
        )


def _link(manifest_of: Callable[[str], Manifest], wanted: str, chain: list[Manifest]) -> Manifest:
    manifest = _parent(manifest_of, wanted, child=chain[-1]) if chain else manifest_of(wanted)
    if manifest.kind is CheckpointKind.STATE:
        raise WrongCheckpointKind(
            f"{wanted!r} is a training state, not a sampler snapshot",
            hint="save_weights_for_sampler writes snapshots that can be served",
        )
    return manifest


def _parent(manifest_of: Callable[[str], Manifest], wanted: str, *, child: Manifest) -> Manifest:
    try:
        manifest = manifest_of(wanted)
    except UnknownSnapshot as exc:
        raise UnknownSnapshot(
            f"snapshot {child.identity!r} is a delta of {wanted!r}, which is not in the store",
            hint="save a base",
        ) from exc
    if child.parent_digest != manifest.digest:
        raise DigestMismatch(
            f"snapshot {child.identity!r} is a delta of another {wanted!r} than the store has: "
            f"digest {child.parent_digest} is now {manifest.digest}",
            hint="save a base",
        )
    return manifest


def _parent_of(delta: Manifest) -> str:
    if delta.parent is None:
        raise DigestMismatch(f"delta {delta.identity!r} names no parent", hint="save a base")
    return delta.parent
