"""`manifest.json` on disk: readable JSON whose last line is a checksum of everything before it.

Readers that only want the fields may decode it as plain JSON; `checksum` is one more field.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

from homefire.wire.errors import DigestMismatch, Unsupported
from homefire.wire.manifest import MANIFEST_FILE, MANIFEST_FORMAT, Manifest

_CHECKSUM = b',\n "checksum": "'
_END = b'"\n}\n'


def encode_manifest(manifest: Manifest) -> bytes:
    body = msgspec.json.format(msgspec.json.encode(manifest), indent=1).removesuffix(b"\n}")
    return body + _CHECKSUM + hashlib.sha256(body).hexdigest().encode() + _END


def decode_manifest(data: bytes, *, source: str) -> Manifest:
    """DigestMismatch when a bit of the file changed; Unsupported when a newer version wrote it."""
    body, _, checksum = data.rpartition(_CHECKSUM)
    if checksum != hashlib.sha256(body).hexdigest().encode() + _END:
        raise DigestMismatch(f"{source} is damaged: its checksum does not match")
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except msgspec.DecodeError as exc:
        raise Unsupported(f"{source} is not a manifest that this version reads: {exc}") from exc
    if manifest.format > MANIFEST_FORMAT:
        raise Unsupported(
            f"{source} has format {manifest.format}, this homefire reads up to {MANIFEST_FORMAT}",
            hint="upgrade homefire",
        )
    return manifest


def read_manifest(directory: Path) -> Manifest:
    """FileNotFoundError when the directory is not a checkpoint."""
    path = directory / MANIFEST_FILE
    return decode_manifest(path.read_bytes(), source=str(path))
