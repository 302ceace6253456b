"""Training states: float32 masters, optimizer and step, as safetensors; what `load_state` takes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from homefire.checkpoints.dtypes import num_elements
from homefire.checkpoints.file_digest import file_entry, verify_files
from homefire.checkpoints.manifest_file import read_manifest
from homefire.checkpoints.safetensors_file import read_safetensors, write_safetensors
from homefire.checkpoints.snapshots import SnapshotInfo, check_size_cap, new_manifest
from homefire.checkpoints.store import CheckpointKey, CheckpointStore
from homefire.wire.errors import UnknownSnapshot, WrongCheckpointKind
from homefire.wire.ids import check_name
from homefire.wire.manifest import CheckpointKind, FileEntry, LoraManifest, Manifest
from homefire.wire.tensors import RawTensor, Tensors, digest_tensors

_SUFFIX = ".safetensors"
_NO_EXTRA: Mapping[str, bytes] = {}


def write_state(
    store: CheckpointStore,
    key: CheckpointKey,
    files: Mapping[str, Tensors],
    info: SnapshotInfo,
    *,
    overwrite: bool = False,
    lora: LoraManifest | None = None,
    extra: Mapping[str, bytes] = _NO_EXTRA,
) -> Manifest:
    """Commits tensors by file name (`*.safetensors`) and small extra files by theirs.

    The manifest calls a tensor `<file>:<name>`, so its digest covers all of them. With `overwrite` an
    existing state of that name is replaced; it stays until the new one is durable.
    """
    flat = _flatten(files)
    planned = sum(t.data.nbytes for t in flat.values()) + sum(map(len, extra.values()))
    check_size_cap(key, planned, info.cap_bytes)
    with store.stage(key, overwrite=overwrite) as staged:
        manifest = new_manifest(
            key,
            CheckpointKind.STATE,
            info,
            digest_tensors(flat),
            _write_files(staged.directory, files, extra),
            num_elements=sum(map(num_elements, flat.values())),
            lora=lora,
        )
        staged.commit(manifest)
    return manifest


def read_state(directory: Path) -> tuple[Manifest, dict[str, dict[str, RawTensor]]]:
    """The manifest of a committed state and its tensors by file, as views of the verified files.

    UnknownSnapshot when nothing is there, WrongCheckpointKind for a sampler snapshot, DigestMismatch
    when a file is not what the manifest says; nothing is read before everything is verified.
    """
    try:
        manifest = read_manifest(directory)
    except (FileNotFoundError, NotADirectoryError) as exc:
        raise UnknownSnapshot(
            f"{directory} is not a committed checkpoint",
            hint="list the job's checkpoints for the states it has",
        ) from exc
    if manifest.kind is not CheckpointKind.STATE:
        raise WrongCheckpointKind(
            f"{manifest.identity!r} is a {manifest.kind} sampler snapshot, not a training state",
            hint="give a name that save_state wrote; a sampler snapshot has no optimizer or masters",
        )
    verify_files(directory, manifest)
    names = [name for name in manifest.files if name.endswith(_SUFFIX)]
    return manifest, {name: read_safetensors(directory / name) for name in names}


def read_state_tensors(directory: Path) -> dict[str, RawTensor]:
    """The tensors of `read_state` under the names that the manifest has for them."""
    return _flatten(read_state(directory)[1])


def _flatten(files: Mapping[str, Tensors]) -> dict[str, RawTensor]:
    return {f"{file}:{name}": t for file, tensors in files.items() for name, t in tensors.items()}


def _write_files(
    directory: Path, files: Mapping[str, Tensors], extra: Mapping[str, bytes]
) -> dict[str, FileEntry]:
    entries: dict[str, FileEntry] = {}
    for name, tensors in files.items():
        path = directory / check_name(name, field="files")
        entries[name] = write_safetensors(path, tensors)
    for name, data in extra.items():
        path = directory / check_name(name, field="extra")
        path.write_bytes(data)
        entries[name] = file_entry(path)
    return entries
