"""Where checkpoints live, as their users see it: few verbs, all or nothing.

    stage       write files aside, then commit them under a key, or leave nothing behind
    copy        the same checkpoint under another key
    manifest    what a checkpoint is
    directory   where its files are
    list        what a job has
    summaries   the same for those who ask often
    jobs        who has something
    expire_at   when one ends
    publish     whether other accounts may load it
    pin         whether it stays whatever its age
    delete      take one away
    prune       take away what has ended

Manifests in the store are the truth; control's database only indexes them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import msgspec

from homefire.wire.errors import (
    DuplicateCheckpoint,
    InvalidArgument,
    StorageFailed,
    UnknownSnapshot,
)
from homefire.wire.manifest import CheckpointFamily, Manifest

_NUM_NAMED = 5
"""How many existing checkpoints an error names."""


class CheckpointKey(msgspec.Struct, frozen=True):
    """Example: CheckpointKey("local", "job-3f9a1c2e", "policy", CheckpointFamily.SAMPLER, "step_00010-4b50536f")."""

    account: str
    job: str
    slot: str
    family: CheckpointFamily
    name: str

    def __str__(self) -> str:
        return f"{self.account}/{self.job}/{self.slot}/{self.family}/{self.name}"

    @classmethod
    def of(cls, manifest: Manifest) -> CheckpointKey:
        """Where a checkpoint with this manifest lies."""
        m = manifest
        return cls(m.account, m.job, m.slot, m.family, m.identity)

    def sibling(self, name: str) -> CheckpointKey:
        """Another checkpoint of the same slot and family."""
        return msgspec.structs.replace(self, name=name)


class Staged(Protocol):
    """A checkpoint that nobody can see yet."""

    @property
    def directory(self) -> Path:
        """Write the checkpoint's files here, and nothing below it."""
        ...

    def commit(self, manifest: Manifest) -> None:
        """Publishes the files with this manifest, durably and in one step; at most once.

        DuplicateCheckpoint when the key came into being meanwhile, StorageFailed when the disk refuses.
        """
        ...


class CheckpointStore(Protocol):
    """All methods block. Any number of processes may use one store at a time."""

    def stage(
        self, key: CheckpointKey, *, overwrite: bool = False
    ) -> AbstractContextManager[Staged]:
        """A place to write a new checkpoint; what is not committed in the block is discarded.

        DuplicateCheckpoint when the key exists, unless `overwrite`: then the commit replaces it, and
        until then the predecessor stays.
        """
        ...

    def copy(
        self, source: CheckpointKey, to: CheckpointKey, *, expires_at: float | None
    ) -> Manifest:
        """Commits the files of `source` under `to`, which shares their bytes where it can.

        The copy is private and expires on its own. UnknownSnapshot, DuplicateCheckpoint; a delta
        stands on its parent and is refused with FailedPrecondition.
        """
        ...

    def manifest(self, key: CheckpointKey) -> Manifest:
        """UnknownSnapshot names some that exist; DigestMismatch when the manifest is damaged."""
        ...

    def exists(self, key: CheckpointKey) -> bool: ...

    def directory(self, key: CheckpointKey) -> Path:
        """Where the files of a committed checkpoint are, to be read only. UnknownSnapshot."""
        ...

    def list(
        self,
        account: str,
        job: str,
        *,
        slot: str | None = None,
        family: CheckpointFamily | None = None,
    ) -> list[Manifest]:
        """Oldest first. Expired ones are left out, though they load until they are deleted: a
        snapshot that still counts may descend from them."""
        ...

    def jobs(self, account: str) -> list[str]:
        """The jobs of an account that have ever saved a checkpoint, sorted."""
        ...

    def loadable(self, key: CheckpointKey) -> Manifest:
        """`manifest` of a checkpoint that is asked for by name: an expired one is UnknownSnapshot."""
        ...

    def expire_at(self, key: CheckpointKey, expires_at: float | None) -> Manifest:
        """Unix time in seconds; None: never. The manifest as it now is. UnknownSnapshot."""
        ...

    def publish(self, key: CheckpointKey, *, public: bool) -> Manifest:
        """The manifest as it now is. UnknownSnapshot."""
        ...

    def pin(self, key: CheckpointKey, *, pinned: bool) -> Manifest:
        """The manifest as it now is. UnknownSnapshot."""
        ...

    def summaries(self, account: str, job: str, *, slot: str) -> Sequence[Manifest]:
        """`list` of one slot, with `tensors` left empty. What did not change since it was asked for
        last is not read again."""
        ...

    def delete(self, key: CheckpointKey) -> None:
        """UnknownSnapshot when there is none. What descends from it can no longer be loaded."""
        ...

    def prune(self, is_needed: Callable[[Manifest], bool]) -> Sequence[CheckpointKey]:
        """Deletes what expired a while ago (`expiry.GRACE_S`), in every account; returns the keys.

        Never a parent of a snapshot that stays, nor what the caller needs.
        """
        ...


def duplicate(key: CheckpointKey) -> DuplicateCheckpoint:
    return DuplicateCheckpoint(
        f"{key.family} checkpoint {key.name!r} of {key.account}/{key.job} exists",
        hint="save under another name, or ask for overwrite where the call has it",
        field="name",
    )


def unknown(key: CheckpointKey, siblings: Sequence[str], *, reason: str) -> UnknownSnapshot:
    """`siblings` are the identities that there are, oldest first."""
    names = ", ".join(map(repr, siblings[-_NUM_NAMED:])) or "none yet"
    return UnknownSnapshot(
        f"{key.family} checkpoint {key.name!r} {reason} of {key.account}/{key.job}, "
        f"slot {key.slot!r}",
        hint=f"the latest that exist: {names}",
    )


def check_belongs(manifest: Manifest, key: CheckpointKey) -> None:
    named = CheckpointKey.of(manifest)
    if named != key:
        raise InvalidArgument(f"the manifest names {named}, the checkpoint is {key}")


def check_files(manifest: Manifest, directory: Path) -> None:
    """A manifest that names a missing file, or none for one that is there, must never be published."""
    written = {path.name: path.stat().st_size for path in directory.iterdir()}
    named = {name: entry.size_bytes for name, entry in manifest.files.items()}
    if written != named:
        raise StorageFailed(
            f"checkpoint {manifest.identity!r} was not written as its manifest says: "
            f"files {sorted(written.items() ^ named.items())}"
        )
