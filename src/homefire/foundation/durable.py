"""All durable writes of homefire: a file is whole and on disk, or not there.

write a temporary file -> flush -> fsync the file -> rename -> fsync the directory
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from homefire.foundation.disk import SYSTEM, Disk
from homefire.foundation.failpoints import failpoint

_READ_BYTES = 4 << 20


def write_file(path: Path, data: bytes, *, mode: int = 0o644, disk: Disk = SYSTEM) -> None:
    """Replaces `path` by `data`, atomically and durably."""
    directory = disk.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        write_file_in(directory, path.name, data, mode=mode, disk=disk)
    finally:
        disk.close(directory)


def write_file_in(
    directory: int, name: str, data: bytes, *, mode: int = 0o644, disk: Disk = SYSTEM
) -> None:
    """The same in an open directory, wherever it was renamed to meanwhile."""
    temporary = f".{name}.{secrets.token_hex(4)}.tmp"
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        file = disk.open(temporary, flags, mode, dir_fd=directory)
        try:
            write_all(file, data, 0, disk=disk)
            failpoint("durable.before_fsync")
            disk.fsync(file)
        finally:
            disk.close(file)
        failpoint("durable.before_rename")
        disk.replace(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            disk.unlink(temporary, dir_fd=directory)
        raise
    disk.fsync(directory)


def write_private(path: Path, data: bytes) -> None:
    """The same for secrets: readable by the owner only, from the first byte on."""
    write_file(path, data, mode=0o600)


def publish_directory(temporary: Path, final: Path, *, disk: Disk = SYSTEM) -> None:
    """Syncs every file below `temporary`, then renames it to `final`, durably.

    Both must be on one file system. `final` must not exist.
    """
    _sync_tree(temporary, disk)
    failpoint("durable.before_publish")
    disk.rename(temporary, final)
    failpoint("durable.after_publish")
    sync_directory(final.parent, disk=disk)


def make_directory(path: Path, *, disk: Disk = SYSTEM) -> None:
    """Creates it in its parent, durably; one that is there is well."""
    with contextlib.suppress(FileExistsError):
        disk.mkdir(path)
    sync_directory(path.parent, disk=disk)


def remove_tree(path: Path, *, disk: Disk = SYSTEM) -> None:
    """Not durably: after a power cut some or all of it may be back."""
    try:
        names = disk.listdir(path)
    except NotADirectoryError:
        disk.unlink(path)
        return
    for name in names:
        remove_tree(path / name, disk=disk)
    disk.rmdir(path)


def read_file(path: Path, *, disk: Disk = SYSTEM) -> bytes:
    return b"".join(chunks_of(path, disk=disk))


def chunks_of(path: Path, *, disk: Disk = SYSTEM) -> Iterator[bytes]:
    """A file's bytes, a piece at a time: the kernel reads 2 GiB at most, however much is asked for."""
    file, offset = disk.open(path, os.O_RDONLY), 0
    try:
        while chunk := disk.pread(file, _READ_BYTES, offset):
            yield chunk
            offset += len(chunk)
    finally:
        disk.close(file)


def size_of(path: Path, *, disk: Disk = SYSTEM) -> int:
    """In bytes."""
    file = disk.open(path, os.O_RDONLY)
    try:
        return disk.lseek(file, 0, os.SEEK_END)
    finally:
        disk.close(file)


def write_all(file: int, data: bytes, offset: int, *, disk: Disk = SYSTEM) -> None:
    """Not durably: `fsync` is the caller's."""
    view = memoryview(data)
    while view:
        written = disk.pwrite(file, view, offset)
        view, offset = view[written:], offset + written


def sync_directory(path: Path, *, disk: Disk = SYSTEM) -> None:
    file = disk.open(path, os.O_RDONLY)
    try:
        disk.fsync(file)
    finally:
        disk.close(file)


def _sync_tree(path: Path, disk: Disk) -> None:
    with contextlib.suppress(NotADirectoryError):
        for name in disk.listdir(path):
            _sync_tree(path / name, disk)
    sync_directory(path, disk=disk)
