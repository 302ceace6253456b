"""Manifests without their tensors, kept in memory: those of a large model take milliseconds to read,
and a list of a thousand would take seconds each time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec

from homefire.wire.manifest import MANIFEST_FILE, Manifest

_Signature = tuple[int, int, int]
"""Inode, time and size of a manifest's file: a manifest is only ever replaced by a rename."""


class Summaries:
    """By family's directory. Any number of threads may read; the disk has the last word."""

    def __init__(self) -> None:
        self._known: dict[Path, dict[Path, tuple[_Signature, Manifest]]] = {}

    def read(
        self,
        family: Path,
        checkpoints: Callable[[Path], list[Path]],
        read_manifest: Callable[[Path], Manifest | None],
    ) -> list[Manifest]:
        """Of every checkpoint that `checkpoints` finds in the directory `family`."""
        if not family.is_dir():
            self._known.pop(family, None)
            return []
        before = self._known.get(family, {})
        found: dict[Path, tuple[_Signature, Manifest]] = {}
        for directory in checkpoints(family):
            signature = _signature(directory)
            known = before.get(directory)
            if known is not None and known[0] == signature:
                found[directory] = known
            elif signature is not None and (manifest := read_manifest(directory)) is not None:
                found[directory] = signature, msgspec.structs.replace(manifest, tensors={})
        self._known[family] = found
        return [manifest for _, manifest in found.values()]


def _signature(directory: Path) -> _Signature | None:
    """None for what was deleted meanwhile."""
    try:
        stat = (directory / MANIFEST_FILE).stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return stat.st_ino, stat.st_mtime_ns, stat.st_size
