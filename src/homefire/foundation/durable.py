"""All durable writes of homefire: a file is whole and on disk, or not there.

write a temporary file -> flush -> fsync the file -> rename -> fsync the directory
"""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

from homefire.foundation.failpoints import failpoint


def write_file(path: Path, data: bytes, *, mode: int = 0o644) -> None:
    """Replaces `path` by `data`, atomically and durably."""
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        write_file_in(directory, path.name, data, mode=mode)
    finally:
        os.close(directory)


def write_file_in(directory: int, name: str, data: bytes, *, mode: int = 0o644) -> None:
    """The same in an open directory, wherever it was renamed to meanwhile."""
    temporary = f".{name}.{secrets.token_hex(4)}.tmp"
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        descriptor = os.open(temporary, flags, mode, dir_fd=directory)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            failpoint("durable.before_fsync")
            os.fsync(file.fileno())
        failpoint("durable.before_rename")
        os.replace(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=directory)
        raise
    os.fsync(directory)


def write_private(path: Path, data: bytes) -> None:
    """The same for secrets: readable by the owner only, from the first byte on."""
    write_file(path, data, mode=0o600)


def publish_directory(temporary: Path, final: Path) -> None:
    """Syncs every file below `temporary`, then renames it to `final`, durably.

    Both must be on one file system. `final` must not exist.
    """
    for root, directories, files in os.walk(temporary):
        for name in files:
            _sync_path(Path(root) / name)
        for name in directories:
            _sync_path(Path(root) / name)
    _sync_path(temporary)
    failpoint("durable.before_publish")
    os.rename(temporary, final)
    failpoint("durable.after_publish")
    sync_directory(final.parent)


def sync_directory(path: Path) -> None:
    _sync_path(path)


def _sync_path(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
