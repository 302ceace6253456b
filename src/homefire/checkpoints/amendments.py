"""What may change of a committed checkpoint: when it expires, and who may load it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

from homefire.checkpoints.manifest_file import decode_manifest, encode_manifest
from homefire.foundation.durable import write_file_in
from homefire.wire.manifest import MANIFEST_FILE, Manifest


def amend_manifest(directory: Path, change: Callable[[Manifest], Manifest]) -> Manifest:
    """Replaces the manifest in `directory` by `change` of it, durably and in one step.

    Amendments of one checkpoint come one after another, in any number of processes. They follow the
    directory, not its name, so they never reach what replaces the checkpoint meanwhile.
    FileNotFoundError when it is gone.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        manifest = _read(descriptor, source=str(directory / MANIFEST_FILE))
        amended = change(manifest)
        if amended != manifest:
            write_file_in(descriptor, MANIFEST_FILE, encode_manifest(amended))
        return amended
    finally:
        os.close(descriptor)


def _read(directory: int, *, source: str) -> Manifest:
    descriptor = os.open(MANIFEST_FILE, os.O_RDONLY, dir_fd=directory)
    with os.fdopen(descriptor, "rb") as file:
        return decode_manifest(file.read(), source=source)
