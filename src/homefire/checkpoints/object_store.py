"""The store on S3-compatible storage:

    <prefix>/<account>/<job>/<slot>/<family>/<name>/
    ├── manifest.json          put last, by one conditional request: the commit
    └── <generation>/…         the files that it names; a base is an ordinary Hugging Face directory

`generation` is a digest of the files' names, sizes and digests, so that what replaces a checkpoint lies
beside it, and the manifest decides between them at once. Nobody needs more than the URL: files are read
into a cache of this machine (`object_cache.py`), where they are whole and checked before they are seen.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec

from homefire.checkpoints.bucket import Bucket, ConditionFailed, ETag, Listed, NoSuchObject
from homefire.checkpoints.expiry import delete_prunable
from homefire.checkpoints.lineage import check_stands_alone
from homefire.checkpoints.manifest_file import decode_manifest, encode_manifest
from homefire.checkpoints.object_cache import ObjectCache
from homefire.checkpoints.staging import staging_directory
from homefire.checkpoints.store import (
    CheckpointKey,
    Staged,
    check_belongs,
    check_files,
    duplicate,
    unknown,
)
from homefire.foundation.clock import Clock, SystemClock
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
_NUM_READS = 3
"""How often a manifest that is damaged on the way is asked for again."""
_ABANDONED = timedelta(days=1)
"""Files without a manifest that are older were left by a save that never committed."""
_READERS = 16


class ObjectStore:
    """Implements `CheckpointStore` in a bucket."""

    def __init__(self, bucket: Bucket, cache: ObjectCache, clock: Clock | None = None) -> None:
        self._bucket = bucket
        self._cache = cache
        self._clock = clock or SystemClock()
        self._known: dict[str, tuple[ETag, Manifest]] = {}
        """Manifests by path; an object of the same ETag is the same."""

    @contextmanager
    def stage(self, key: CheckpointKey, *, overwrite: bool = False) -> Iterator[Staged]:
        if not overwrite and self.exists(key):
            raise duplicate(key)
        try:
            with staging_directory(self._cache.staging()) as directory:
                yield _StagedObjects(self, key, directory, overwrite=overwrite)
        except OSError as exc:
            raise StorageFailed(
                f"checkpoint {key} could not be written: {exc}",
                hint="check the free space of the disk that caches the store, then save again",
            ) from exc

    def copy(
        self, source: CheckpointKey, to: CheckpointKey, *, expires_at: float | None
    ) -> Manifest:
        manifest = self.manifest(source)
        check_stands_alone(manifest)
        if self.exists(to):
            raise duplicate(to)
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
        here, there = _files(source, manifest), _files(to, copied)
        try:
            for name in manifest.files:
                self._bucket.copy(f"{here}/{name}", f"{there}/{name}")
        except NoSuchObject as exc:
            raise FailedPrecondition(
                f"checkpoint {source} was overwritten while it was copied", hint="copy it again"
            ) from exc
        self.put_manifest(to, copied, overwrite=False)
        return copied

    def manifest(self, key: CheckpointKey) -> Manifest:
        try:
            return self._read(_manifest_path(key))[0]
        except NoSuchObject as exc:
            raise self._unknown(key) from exc

    def exists(self, key: CheckpointKey) -> bool:
        return self._bucket.exists(_manifest_path(key))

    def directory(self, key: CheckpointKey) -> Path:
        while True:
            manifest = self.manifest(key)
            try:
                return self._cache.directory(
                    self._bucket, _files(key, manifest), _folder(key), manifest
                )
            except NoSuchObject as exc:
                if self.manifest(key).files == manifest.files:
                    raise DigestMismatch(
                        f"checkpoint {key} is damaged: a file of its manifest is missing",
                        hint="load another checkpoint, or save a base again",
                    ) from exc

    def list(
        self,
        account: str,
        job: str,
        *,
        slot: str | None = None,
        family: CheckpointFamily | None = None,
    ) -> list[Manifest]:
        now = self._clock.now()
        alive = [m for m in self._all(_job(account, job), slot, family) if not m.has_expired(now)]
        return sorted(alive, key=lambda m: (m.created_at, m.step, m.identity))

    def jobs(self, account: str) -> list[str]:
        return self._bucket.folders(check_name(account, field="account"))

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

    def summaries(self, account: str, job: str, *, slot: str) -> Sequence[Manifest]:
        found = self.list(account, job, slot=slot)
        return [msgspec.structs.replace(manifest, tensors={}) for manifest in found]

    def delete(self, key: CheckpointKey) -> None:
        """The manifest first: from then on there is no such checkpoint."""
        if not self.exists(key):
            raise self._unknown(key)
        self._bucket.delete([_manifest_path(key)])
        self._known.pop(_manifest_path(key), None)
        self._bucket.delete([listed.path for listed in self._bucket.list(_folder(key))])
        self._cache.forget(_folder(key))

    def prune(self, is_needed: Callable[[Manifest], bool]) -> Sequence[CheckpointKey]:
        deleted: list[CheckpointKey] = []
        now = self._clock.now()
        for account in self._bucket.folders(""):
            for job in self.jobs(account):
                objects = self._bucket.list(f"{account}/{job}")
                manifests = self._manifests(objects)
                self._sweep(objects)
                deleted += delete_prunable(self, manifests, is_needed, now=now)
        return deleted

    def put_manifest(self, key: CheckpointKey, manifest: Manifest, *, overwrite: bool) -> None:
        """The commit. DuplicateCheckpoint when somebody else committed the key first."""
        write = self._bucket.replace if overwrite else self._bucket.create
        try:
            write(_manifest_path(key), encode_manifest(manifest))
        except ConditionFailed as exc:
            raise duplicate(key) from exc

    def put_files(self, key: CheckpointKey, directory: Path, manifest: Manifest) -> None:
        """Every file that the manifest names, from `directory`."""
        where = _files(key, manifest)
        for name in manifest.files:
            self._bucket.upload(f"{where}/{name}", directory / name)

    def keep(self, key: CheckpointKey, directory: Path, manifest: Manifest) -> None:
        """What was just written need not be read again."""
        self._cache.adopt(directory, _folder(key), manifest)

    def _amend(self, key: CheckpointKey, change: Callable[[Manifest], Manifest]) -> Manifest:
        path = _manifest_path(key)
        while True:
            try:
                manifest, etag = self._read(path)
            except NoSuchObject as exc:
                raise self._unknown(key) from exc
            amended = change(manifest)
            if amended == manifest:
                return manifest
            try:
                self._bucket.replace(path, encode_manifest(amended), etag=etag)
            except (ConditionFailed, NoSuchObject):
                continue  # somebody else changed it meanwhile
            return amended

    def _read(self, path: str) -> tuple[Manifest, ETag]:
        """NoSuchObject. Bytes that are damaged on the way are asked for again."""
        for left in reversed(range(_NUM_READS)):
            data, etag = self._bucket.read(path)
            try:
                manifest = decode_manifest(data, source=f"{self._bucket.url}/{path}")
            except DigestMismatch:
                if not left:
                    raise
                continue
            if etag:
                self._known[path] = etag, manifest
            return manifest, etag
        raise AssertionError("unreachable")

    def _all(self, job: str, slot: str | None, family: CheckpointFamily | None) -> list[Manifest]:
        folder = job if slot is None else f"{job}/{check_name(slot, field='slot')}"
        found = self._manifests(self._bucket.list(folder))
        return [m for m in found if family is None or m.family is family]

    def _manifests(self, objects: Sequence[Listed]) -> list[Manifest]:
        listed = [each for each in objects if each.path.endswith(f"/{MANIFEST_FILE}")]
        with ThreadPoolExecutor(_READERS) as pool:
            found = list(pool.map(self._read_or_warn, listed))
        return [manifest for manifest in found if manifest is not None]

    def _read_or_warn(self, listed: Listed) -> Manifest | None:
        known = self._known.get(listed.path)
        if known is not None and known[0] == listed.etag:
            return known[1]
        try:
            return self._read(listed.path)[0]
        except NoSuchObject:
            return None
        except (DigestMismatch, Unsupported) as exc:
            log.warning("left out of the listing: %s", exc)
            return None

    def _sweep(self, objects: Sequence[Listed]) -> None:
        """Removes files that no manifest names: of saves that never committed, and of what was
        replaced a day ago, so that whoever still reads it may finish."""
        before = datetime.now(UTC) - _ABANDONED
        named = {
            f"{folder}/{_generation(known[1])}"
            for path, known in self._known.items()
            if (folder := path.removesuffix(f"/{MANIFEST_FILE}"))
        }
        committed = {each.path for each in objects if each.path.endswith(f"/{MANIFEST_FILE}")}
        unread = {path for path in committed if path not in self._known}
        abandoned = [
            each.path
            for each in objects
            if each.path not in committed
            and each.modified < before
            and each.path.rpartition("/")[0] not in named
            and f"{each.path.rsplit('/', 2)[0]}/{MANIFEST_FILE}" not in unread
        ]
        self._bucket.delete(abandoned)

    def _unknown(
        self, key: CheckpointKey, *, reason: str = "is not in the store"
    ) -> UnknownSnapshot:
        siblings = self.list(key.account, key.job, slot=key.slot, family=key.family)
        return unknown(key, [m.identity for m in siblings], reason=reason)


class _StagedObjects:
    def __init__(
        self, store: ObjectStore, key: CheckpointKey, directory: Path, *, overwrite: bool
    ) -> None:
        self.directory = directory
        self._store = store
        self._key = key
        self._overwrite = overwrite

    def commit(self, manifest: Manifest) -> None:
        check_belongs(manifest, self._key)
        check_files(manifest, self.directory)
        self._store.put_files(self._key, self.directory, manifest)
        failpoint("store.before_commit")
        self._store.put_manifest(self._key, manifest, overwrite=self._overwrite)
        failpoint("store.after_commit")
        self._store.keep(self._key, self.directory, manifest)


def _generation(manifest: Manifest) -> str:
    files = sorted((name, e.size_bytes, e.sha256) for name, e in manifest.files.items())
    return hashlib.sha256(msgspec.json.encode(files)).hexdigest()[:16]


def _job(account: str, job: str) -> str:
    return f"{check_name(account, field='account')}/{check_name(job, field='job')}"


def _folder(key: CheckpointKey) -> str:
    slot, name = check_name(key.slot, field="slot"), check_name(key.name, field="name")
    return f"{_job(key.account, key.job)}/{slot}/{key.family}/{name}"


def _files(key: CheckpointKey, manifest: Manifest) -> str:
    return f"{_folder(key)}/{_generation(manifest)}"


def _manifest_path(key: CheckpointKey) -> str:
    return f"{_folder(key)}/{MANIFEST_FILE}"
