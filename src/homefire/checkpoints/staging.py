"""Directories that are being written beside the published ones, and what crashes leave of them.

A staging directory is named `.tmp-<random>` (never a checkpoint's name, which starts with a letter or
digit) and locked with flock for as long as its writer lives, so that the leftovers of a crash can be
told from the work of another process, on any host that shares the file system.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from homefire.foundation.durable import sync_directory

_PREFIX = ".tmp-"


@contextmanager
def staging_directory(parent: Path) -> Iterator[Path]:
    """A fresh locked directory in `parent`; removed at the end unless it was renamed away."""
    make_directory(parent)
    directory, lock = _make_locked(parent)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        os.close(lock)


def remove_leftovers(parent: Path) -> None:
    """Removes staging directories in `parent` whose writer is gone."""
    for path in parent.glob(f"{_PREFIX}*"):
        lock = _try_lock(path)
        if lock is not None:
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)


def discard_directory(path: Path) -> None:
    """Removes a published directory; it vanishes in one step, and a crash leaves a leftover."""
    doomed = path.with_name(f"{_PREFIX}{secrets.token_hex(8)}")
    os.rename(path, doomed)
    sync_directory(path.parent)
    shutil.rmtree(doomed, ignore_errors=True)


def make_directory(path: Path) -> None:
    """`mkdir -p`, durably."""
    if path.is_dir():
        return
    make_directory(path.parent)
    path.mkdir(exist_ok=True)
    sync_directory(path.parent)


def _make_locked(parent: Path) -> tuple[Path, int]:
    while True:
        directory = parent / f"{_PREFIX}{secrets.token_hex(8)}"
        directory.mkdir()
        lock = _try_lock(directory)
        if lock is not None:
            return directory, lock


def _try_lock(directory: Path) -> int | None:
    """A descriptor that holds the lock; None when another holds it or the directory is gone.

    Between making a directory and locking it, another process may take it for a leftover and remove
    it; hence the second look at the path once the lock is held.
    """
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), os.stat(directory)):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(descriptor)
    return None
