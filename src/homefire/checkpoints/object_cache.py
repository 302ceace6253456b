"""Files of an object store on this machine: read once, whole and checked before anybody sees them.

    <root>/boot-<id>/<url's digest>/<folder's digest>-<generation>/    a checkpoint's files, and its manifest
                                    .tmp-…                             being written, to be uploaded
                                    partial-…                          being downloaded, or left by a crash

Any number of processes share it. Nothing in it is synced to the disk, so what an earlier boot left is
not trusted and goes. What was not asked for longest goes when there is more than `max_bytes`.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
import time
from contextlib import suppress
from pathlib import Path

import msgspec

from homefire.checkpoints.bucket import Bucket
from homefire.checkpoints.manifest_file import encode_manifest
from homefire.checkpoints.staging import remove_leftovers
from homefire.wire.manifest import MANIFEST_FILE, Manifest

_BOOT = "boot-"
_PARTIAL = "partial-"
_IN_USE_S = 600.0
"""What was asked for so lately may still be about to be opened."""


class ObjectCache:
    def __init__(self, root: Path, url: str, *, boot: str, max_bytes: int) -> None:
        self._boot = root / f"{_BOOT}{boot}"
        self._directory = self._boot / hashlib.sha256(url.encode()).hexdigest()[:16]
        self._max_bytes = max_bytes
        self._downloading = threading.Lock()
        self._make(root)

    def staging(self) -> Path:
        """Where to write what will be uploaded."""
        return self._directory

    def directory(self, bucket: Bucket, files: str, folder: str, manifest: Manifest) -> Path:
        """The checkpoint's files, downloaded from `files` in the bucket if they are not here.

        NoSuchObject when one is missing there, DigestMismatch when its bytes are not the manifest's.
        """
        final = self._final(folder, manifest)
        with self._downloading:
            if not final.is_dir():
                self._download(bucket, files, final, manifest)
        with suppress(OSError):
            os.utime(final)
        return final

    def _download(self, bucket: Bucket, files: str, final: Path, manifest: Manifest) -> None:
        partial = final.with_name(f"{_PARTIAL}{final.name}-{os.getpid()}")
        partial.mkdir(parents=True, exist_ok=True)
        missing = [(name, e) for name, e in manifest.files.items() if not (partial / name).exists()]
        bucket.download([(f"{files}/{name}", partial / name, e) for name, e in missing])
        self._publish(partial, final, manifest)

    def adopt(self, directory: Path, folder: str, manifest: Manifest) -> None:
        """Takes a staged directory over, as it was uploaded."""
        final = self._final(folder, manifest)
        if not final.is_dir():
            self._publish(directory, final, manifest)

    def forget(self, folder: str) -> None:
        for path in self._directory.glob(f"{_digest(folder)}-*"):
            shutil.rmtree(path, ignore_errors=True)

    def _publish(self, directory: Path, final: Path, manifest: Manifest) -> None:
        (directory / MANIFEST_FILE).write_bytes(encode_manifest(manifest))
        try:
            os.rename(directory, final)
        except OSError:
            if not final.is_dir():
                raise
            shutil.rmtree(directory, ignore_errors=True)  # another process was first
        self._trim()

    def _trim(self) -> None:
        names = (path for path in self._directory.iterdir() if not path.name.startswith("."))
        kept = [path for path in names if not path.name.startswith(_PARTIAL)]
        sizes = {path: _size(path) for path in kept}
        total, before = sum(sizes.values()), time.time() - _IN_USE_S
        for path in sorted(kept, key=_last_used):
            if total <= self._max_bytes or _last_used(path) > before:
                return
            shutil.rmtree(path, ignore_errors=True)
            total -= sizes[path]

    def _final(self, folder: str, manifest: Manifest) -> Path:
        files = sorted((name, e.sha256) for name, e in manifest.files.items())
        generation = hashlib.sha256(msgspec.json.encode(files)).hexdigest()[:16]
        return self._directory / f"{_digest(folder)}-{generation}"

    def _make(self, root: Path) -> None:
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in root.glob(f"{_BOOT}*"):
            if path != self._boot:
                shutil.rmtree(path, ignore_errors=True)
        remove_leftovers(self._directory)
        for path in self._directory.glob(f"{_PARTIAL}*"):
            if not _runs(int(path.name.rpartition("-")[2])):
                self._inherit(path)

    def _inherit(self, partial: Path) -> None:
        """Goes on with the download of a process that died."""
        stem = partial.name.rpartition("-")[0]
        try:
            os.rename(partial, partial.with_name(f"{stem}-{os.getpid()}"))
        except OSError:
            shutil.rmtree(partial, ignore_errors=True)  # two left one of the same


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it runs, and is not ours
    return True


def _digest(folder: str) -> str:
    return hashlib.sha256(folder.encode()).hexdigest()[:24]


def _size(directory: Path) -> int:
    total = 0
    for path in directory.glob("*"):
        with suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def _last_used(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
