"""The calls by which homefire makes things durable: a seam, so that a test can take the power away.

Names and meaning are those of `os`, which is the disk of every process. The test kit has another one
(tests/faults/simulated_disk.py): it forgets what was not synced.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol


class Disk(Protocol):
    """What is durable when: data of a file after its `fsync`, a name (created, renamed, removed) after
    the `fsync` of its directory. Before that, any part of it may be there after a power cut."""

    def open(
        self, path: str | Path, flags: int, mode: int = 0o777, *, dir_fd: int | None = None
    ) -> int: ...

    def close(self, fd: int, /) -> None: ...

    def pread(self, fd: int, length: int, offset: int, /) -> bytes: ...

    def pwrite(self, fd: int, data: bytes | memoryview, offset: int, /) -> int: ...

    def ftruncate(self, fd: int, length: int, /) -> None: ...

    def fsync(self, fd: int, /) -> None: ...

    def lseek(self, fd: int, position: int, whence: int, /) -> int: ...

    def mkdir(self, path: Path, mode: int = 0o777) -> None: ...

    def listdir(self, path: Path) -> list[str]: ...

    def replace(
        self,
        src: str | Path,
        dst: str | Path,
        *,
        src_dir_fd: int | None = None,
        dst_dir_fd: int | None = None,
    ) -> None: ...

    def rename(self, src: Path, dst: Path) -> None: ...

    def unlink(self, path: str | Path, *, dir_fd: int | None = None) -> None: ...

    def rmdir(self, path: Path) -> None: ...

    def statvfs(self, path: Path, /) -> os.statvfs_result: ...


SYSTEM: Disk = os
