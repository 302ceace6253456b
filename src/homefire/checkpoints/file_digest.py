"""Files at rest: their size and SHA-256, and whether they still are what a manifest says."""

from __future__ import annotations

import hashlib
from pathlib import Path

from homefire.wire.errors import DigestMismatch
from homefire.wire.manifest import FileEntry, Manifest


def file_entry(path: Path) -> FileEntry:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileEntry(path.stat().st_size, digest)


def verify_files(directory: Path, manifest: Manifest) -> None:
    """Every file that the manifest names is there with its bytes; DigestMismatch names the first
    that is not."""
    for name, expected in manifest.files.items():
        path = directory / name
        if not path.is_file():
            raise _mismatch(manifest, f"file {name} is missing")
        size = path.stat().st_size
        if size != expected.size_bytes:
            raise _mismatch(manifest, f"file {name} has {size} of {expected.size_bytes} bytes")
        if file_entry(path).sha256 != expected.sha256:
            raise _mismatch(manifest, f"file {name} does not have the SHA-256 of its manifest")


def _mismatch(manifest: Manifest, reason: str) -> DigestMismatch:
    return DigestMismatch(
        f"{manifest.kind} checkpoint {manifest.identity!r} is damaged: {reason}",
        hint="load another checkpoint, or save a base again",
    )
