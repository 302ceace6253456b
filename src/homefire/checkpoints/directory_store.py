"""The store in a directory:

    <root>/<account>/<job>/<slot>/{sampler,state,external}/<name>/
    ├── manifest.json      written last
    └── …                  the files that it names

A checkpoint comes into being with one rename, so it is absent or whole. Replacing one takes two
renames; between them the predecessor is found under `.replaced-<name>`.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from homefire.checkpoints.amendments import amend_manifest
from homefire.checkpoints.expiry import delete_prunable
from homefire.checkpoints.lineage import check_stands_alone
from homefire.checkpoints.manifest_file import encode_manifest, read_manifest
from homefire.checkpoints.staging import discard_directory, remove_leftovers, staging_directory
from homefire.checkpoints.store import (
    CheckpointKey,
    Staged,
    check_belongs,
    check_files,
    duplicate,
    unknown,
)
from homefire.checkpoints.summaries import Summaries
from homefire.foundation.clock import Clock, SystemClock
from homefire.foundation.durable import publish_directory, sync_directory, write_file
from homefire.foundation.failpoints import failpoint
from homefire.wire.errors import (
    DigestMismatch,
    FailedPrecondition,
    StorageFailed,
    UnknownSnapshot,
    Unsupported,
)
from homefire.wire.ids import check_name
from homefire.wire.manifest import MANIFEST_FILE, CheckpointFamily, Manifest

log = logging.getLogger(__name__)
_REPLACED = ".replaced-"


class DirectoryStore:
    """Implements `CheckpointStore` below `root`, which is made when the first checkpoint is."""

    def __init__(self, root: Path, clock: Clock | None = None) -> None:
        self.root = root
        self._clock = clock or SystemClock()
        self._summaries = Summaries()

    @contextmanager
    def stage(self, key: CheckpointKey, *, overwrite: bool = False) -> Iterator[Staged]:
        final = self._final(key)
        if not overwrite:
            _refuse_existing(key, final)
        try:
            remove_leftovers(final.parent)
            with staging_directory(final.parent) as directory:
                yield _StagedDirectory(key, directory, final, overwrite=overwrite)
        except OSError as exc:
            raise StorageFailed(
                f"checkpoint {key} could not be written: {exc}",
                hint="check the free space and health of the store's disk, then save again",
            ) from exc

    def copy(
        self, source: CheckpointKey, to: CheckpointKey, *, expires_at: float | None
    ) -> Manifest:
        manifest, directory = self.manifest(source), self.directory(source)
        check_stands_alone(manifest)
        copied = msgspec.structs.replace(
            manifest,
            account=to.account,
            job=to.job,
            slot=to.slot,
            identity=to.name,
            created_at=self._clock.now(),
            expires_at=expires_at,
            public=False,
            pinned=False,
        )
        with self.stage(to) as staged:
            for name in manifest.files:
                _link_or_copy(directory / name, staged.directory / name)
            if self.manifest(source).digest != manifest.digest:
                raise FailedPrecondition(
                    f"checkpoint {source} was overwritten while it was copied", hint="copy it again"
                )
            staged.commit(copied)
        return copied

    def manifest(self, key: CheckpointKey) -> Manifest:
        try:
            return read_manifest(self.directory(key))
        except FileNotFoundError as exc:
            raise self._unknown(key) from exc

    def exists(self, key: CheckpointKey) -> bool:
        return _published(self._final(key)) is not None

    def directory(self, key: CheckpointKey) -> Path:
        directory = _published(self._final(key))
        if directory is None:
            raise self._unknown(key)
        return directory

    def list(
        self,
        account: str,
        job: str,
        *,
        slot: str | None = None,
        family: CheckpointFamily | None = None,
    ) -> list[Manifest]:
        slots = check_name(slot, field="slot") if slot is not None else "*"
        now = self._clock.now()
        found = _manifests(self._job(account, job), f"{slots}/{family or '*'}")
        alive = [m for m in found if not m.has_expired(now)]
        return sorted(alive, key=lambda m: (m.created_at, m.step, m.identity))

    def jobs(self, account: str) -> list[str]:
        directory = self.root / check_name(account, field="account")
        return sorted(entry.name for entry in directory.glob("*") if entry.is_dir())

    def loadable(self, key: CheckpointKey) -> Manifest:
        manifest = self.manifest(key)
        if manifest.has_expired(self._clock.now()):
            raise self._unknown(key, reason="has expired in the store")
        return manifest

    def expire_at(self, key: CheckpointKey, expires_at: float | None) -> Manifest:
        return self._amend(key, lambda m: msgspec.structs.replace(m, expires_at=expires_at))

    def publish(self, key: CheckpointKey, *, public: bool) -> Manifest:
        return self._amend(key, lambda m: msgspec.structs.replace(m, public=public))

    def pin(self, key: CheckpointKey, *, pinned: bool) -> Manifest:
        return self._amend(key, lambda m: msgspec.structs.replace(m, pinned=pinned))

    def prune(self, is_needed: Callable[[Manifest], bool]) -> Sequence[CheckpointKey]:
        return [key for job in self.root.glob("*/*") for key in self._prune_job(job, is_needed)]

    def _prune_job(
        self, job: Path, is_needed: Callable[[Manifest], bool]
    ) -> Iterator[CheckpointKey]:
        now = self._clock.now()
        families = [path for path in job.glob("*/*") if path.is_dir()]
        manifests = [m for path in families for m in self._summaries.read(path, *_READERS)]
        yield from delete_prunable(self, manifests, is_needed, now=now)

    def _amend(self, key: CheckpointKey, change: Callable[[Manifest], Manifest]) -> Manifest:
        try:
            while True:
                with suppress(FileNotFoundError):  # overwritten since it was found
                    return amend_manifest(self.directory(key), change)
        except OSError as exc:
            raise StorageFailed(f"checkpoint {key} could not be changed: {exc}") from exc

    def summaries(self, account: str, job: str, *, slot: str) -> Sequence[Manifest]:
        directory = self._job(account, job) / check_name(slot, field="slot")
        now = self._clock.now()
        found = [
            manifest
            for family in CheckpointFamily
            for manifest in self._summaries.read(directory / family, *_READERS)
            if not manifest.has_expired(now)
        ]
        return sorted(found, key=lambda m: (m.created_at, m.step, m.identity))

    def delete(self, key: CheckpointKey) -> None:
        self.directory(key)
        final = self._final(key)
        try:
            for directory in (_replaced(final), final):
                if directory.exists():
                    discard_directory(directory)
        except OSError as exc:
            raise StorageFailed(f"checkpoint {key} could not be deleted: {exc}") from exc

    def _job(self, account: str, job: str) -> Path:
        return self.root / check_name(account, field="account") / check_name(job, field="job")

    def _final(self, key: CheckpointKey) -> Path:
        slot = check_name(key.slot, field="slot")
        name = check_name(key.name, field="name")
        return self._job(key.account, key.job) / slot / key.family / name

    def _unknown(
        self, key: CheckpointKey, *, reason: str = "is not in the store"
    ) -> UnknownSnapshot:
        siblings = self.list(key.account, key.job, slot=key.slot, family=key.family)
        return unknown(key, [m.identity for m in siblings], reason=reason)


class _StagedDirectory:
    def __init__(
        self, key: CheckpointKey, directory: Path, final: Path, *, overwrite: bool
    ) -> None:
        self.directory = directory
        self._key = key
        self._final = final
        self._overwrite = overwrite

    def commit(self, manifest: Manifest) -> None:
        check_belongs(manifest, self._key)
        check_files(manifest, self.directory)
        write_file(self.directory / MANIFEST_FILE, encode_manifest(manifest))
        failpoint("store.before_commit")
        if self._overwrite:
            self._publish_over_predecessor()
        else:
            self._publish_new()
        failpoint("store.after_commit")

    def _publish_new(self) -> None:
        _refuse_existing(self._key, self._final)
        try:
            publish_directory(self.directory, self._final)
        except OSError as exc:
            if exc.errno in {errno.ENOTEMPTY, errno.EEXIST}:
                raise duplicate(self._key) from exc
            raise

    def _publish_over_predecessor(self) -> None:
        replaced = _replaced(self._final)
        if self._final.exists():
            if replaced.exists():
                discard_directory(replaced)
            os.rename(self._final, replaced)
            sync_directory(self._final.parent)
        publish_directory(self.directory, self._final)
        if replaced.exists():
            discard_directory(replaced)


def _replaced(final: Path) -> Path:
    return final.with_name(f"{_REPLACED}{final.name}")


def _published(final: Path) -> Path | None:
    """Where a checkpoint's files are now: an interrupted replacement left them under another name."""
    for directory in (final, _replaced(final)):
        if (directory / MANIFEST_FILE).is_file():
            return directory
    return None


def _manifests(job: Path, families: str) -> list[Manifest]:
    """Of all committed checkpoints of a job, expired ones too."""
    found = [_read_or_warn(path) for parent in job.glob(families) for path in _checkpoints(parent)]
    return [manifest for manifest in found if manifest is not None]


def _link_or_copy(source: Path, target: Path) -> None:
    """Files of a committed checkpoint never change, so two may share one."""
    try:
        os.link(source, target)
    except OSError as exc:
        if exc.errno not in {errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP}:
            raise
        shutil.copyfile(source, target)


def _checkpoints(parent: Path) -> list[Path]:
    """Directories of all committed checkpoints in a family's directory."""
    names = {entry.name.removeprefix(_REPLACED) for entry in parent.iterdir()}
    found = [_published(parent / name) for name in names if not name.startswith(".")]
    return [directory for directory in found if directory is not None]


def _read_or_warn(directory: Path) -> Manifest | None:
    """None for what a listing must not offer: damaged, from the future, or deleted meanwhile."""
    try:
        return read_manifest(directory)
    except FileNotFoundError:
        return None
    except (DigestMismatch, Unsupported) as exc:
        log.warning("left out of the listing: %s", exc)
        return None


_READERS = (_checkpoints, _read_or_warn)
"""How summaries find checkpoints in a directory, and read one."""


def _refuse_existing(key: CheckpointKey, final: Path) -> None:
    if _published(final) is not None:
        raise duplicate(key)
