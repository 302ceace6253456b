"""What a download link leads to: one file of a checkpoint, or a tar of what one needs of it.

An archive is never built: its headers are in memory, its files are read where they lie.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterable
from pathlib import Path

import msgspec

from homefire.checkpoints import CheckpointStore, check_stands_alone
from homefire.checkpoints.snapshots import ADAPTER_CONFIG_FILE, ADAPTER_FILE
from homefire.control.download_links import Grant
from homefire.http.ranged import Body, Bytes, OpenFile, Piece
from homefire.wire.errors import NotFound, UnknownSnapshot
from homefire.wire.manifest import CheckpointKind, Manifest
from homefire.wire.peft import adapted_modules, adapter_config

_BLOCK = tarfile.BLOCKSIZE
_END = bytes(2 * _BLOCK)
_COMPLETE = "checkpoint_complete"
"""Clients of the archive look for this file before they trust the others."""
_STATE_WEIGHTS = "weights.safetensors"


def open_download(store: CheckpointStore, grant: Grant) -> Body:
    """Opens what the link is for. Blocks; NotFound when it is not there any more."""
    try:
        manifest, directory = store.loadable(grant.key), store.directory(grant.key)
    except UnknownSnapshot as exc:
        raise _gone(grant) from exc
    try:
        body = _archive(manifest, directory) if grant.file is None else _file(grant, directory)
    except FileNotFoundError as exc:
        raise _gone(grant) from exc
    # Looked at last: files that were opened behind an overwrite are not those of the link.
    if not store.exists(grant.key) or store.manifest(grant.key).digest != grant.digest:
        body.close()
        raise _gone(grant)
    return body


def _file(grant: Grant, directory: Path) -> Body:
    """The signed link names a file of the manifest, so it names nothing outside the directory."""
    assert grant.file is not None
    tag = hashlib.sha256(f"{grant.digest}/{grant.file}".encode()).hexdigest()
    return Body([OpenFile(directory / grant.file)], _media_type(grant.file), grant.file, tag)


def _archive(manifest: Manifest, directory: Path) -> Body:
    check_stands_alone(manifest)
    pieces: list[Piece] = []
    try:
        for name, content in _members(manifest, directory):
            pieces += _member(name, content, modified_at=manifest.created_at)
    except BaseException:
        Body(pieces, "", "", "").close()
        raise
    tag = hashlib.sha256(f"{manifest.digest}/{manifest.created_at}".encode()).hexdigest()
    pieces.append(Bytes(_END))
    return Body(pieces, "application/x-tar", f"{manifest.identity}.tar", tag)


def _members(manifest: Manifest, directory: Path) -> Iterable[tuple[str, Piece]]:
    """An adapter's training state is given as the PEFT directory of its weights; all else as it is."""
    if manifest.kind is CheckpointKind.STATE and manifest.lora is not None:
        yield ADAPTER_FILE, OpenFile(directory / _STATE_WEIGHTS)
        yield ADAPTER_CONFIG_FILE, Bytes(_adapter_config(manifest))
    else:
        for name in manifest.files:
            yield name, OpenFile(directory / name)
    yield _COMPLETE, Bytes(b"")


def _adapter_config(manifest: Manifest) -> bytes:
    """Tensors of a state are called `<file>:<name>`; masters of an adapter bear PEFT's names."""
    assert manifest.lora is not None
    prefix = f"{_STATE_WEIGHTS}:"
    names = [name.removeprefix(prefix) for name in manifest.tensors if name.startswith(prefix)]
    config = adapter_config(
        rank=manifest.lora.rank,
        alpha=manifest.lora.alpha,
        base_model=manifest.base_model,
        target_modules=adapted_modules(names),
    )
    return msgspec.json.format(msgspec.json.encode(config), indent=2)


def _member(name: str, content: Piece, *, modified_at: float) -> list[Piece]:
    header = tarfile.TarInfo(name)
    header.size, header.mode, header.mtime = content.size, 0o644, int(modified_at)
    padding = -content.size % _BLOCK
    return [Bytes(header.tobuf(tarfile.GNU_FORMAT)), content, Bytes(bytes(padding))]


def _media_type(name: str) -> str:
    return "application/json" if name.endswith(".json") else "application/octet-stream"


def _gone(grant: Grant) -> NotFound:
    return NotFound(
        f"checkpoint {grant.key.name!r}, which this link is for, is not there any more",
        hint="it was deleted, overwritten or has expired",
    )
