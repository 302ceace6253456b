"""One front per job: a second one would append to the same journal."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from homefire.wire.errors import Unavailable

_WAIT_S = 20.0
"""For an older front that is on its way out; the kernel frees the lock of one that died."""
_LOOK_INTERVAL_S = 0.05


@contextmanager
def sole_front(job_dir: Path, *, wait_s: float = _WAIT_S) -> Generator[None]:
    """Held while the process lives. Unavailable, with the holder's pid, when another front does not end."""
    file = os.open(job_dir / "front.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        _lock(file, job_dir, deadline=time.monotonic() + wait_s)
        os.ftruncate(file, 0)
        os.pwrite(file, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(file)


def _lock(file: int, job_dir: Path, *, deadline: float) -> None:
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError as exc:
            if time.monotonic() >= deadline:
                holder = os.pread(file, 32, 0).decode()
                raise Unavailable(
                    f"process {holder} is the trainer of {job_dir} already",
                    hint="one front writes a job's journal; stop that process first",
                ) from exc
        time.sleep(_LOOK_INTERVAL_S)
