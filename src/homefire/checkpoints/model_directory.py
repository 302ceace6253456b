"""Ordinary Hugging Face directories: weights as safetensors, and the files that go with them."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import msgspec

from homefire.checkpoints.file_digest import file_entry
from homefire.checkpoints.safetensors_file import read_safetensors, write_safetensors
from homefire.wire.errors import DigestMismatch, ModelUnavailable
from homefire.wire.manifest import MANIFEST_FILE, FileEntry
from homefire.wire.tensors import RawTensor, Tensors

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000
"""As `save_pretrained` cuts them."""
_WEIGHT_SUFFIXES = {
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".ot",
}  # fmt: skip
_PT_METADATA = {"format": "pt"}


class _IndexMetadata(msgspec.Struct, frozen=True):
    total_size: int = 0


class _Index(msgspec.Struct, frozen=True):
    weight_map: dict[str, str]
    metadata: _IndexMetadata = _IndexMetadata()


def read_model_directory(directory: Path) -> dict[str, RawTensor]:
    """All tensors of `model.safetensors`, or of the shards that the index names; views of the files.

    ModelUnavailable when files are missing, DigestMismatch when a file is damaged.
    """
    single = directory / WEIGHTS_FILE
    if single.is_file():
        return read_safetensors(single)
    index_file = directory / INDEX_FILE
    if not index_file.is_file():
        raise ModelUnavailable(
            f"{directory} has neither {WEIGHTS_FILE} nor {INDEX_FILE}",
            hint="give a directory that save_pretrained wrote with safe serialization",
        )
    return _read_shards(directory, _read_index(index_file))


def write_model(
    directory: Path, tensors: Tensors, *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> dict[str, FileEntry]:
    """Writes the weights as one file, or as shards with an index. Returns the files written."""
    shards = _cut(tensors, max_shard_bytes)
    if len(shards) == 1:
        return {WEIGHTS_FILE: write_safetensors(directory / WEIGHTS_FILE, shards[0], _PT_METADATA)}
    files: dict[str, FileEntry] = {}
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        files[name] = write_safetensors(directory / name, shard, _PT_METADATA)
        weight_map.update(dict.fromkeys(shard, name))
    index = _Index(weight_map, _IndexMetadata(sum(t.data.nbytes for t in tensors.values())))
    (directory / INDEX_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(index), indent=2))
    files[INDEX_FILE] = file_entry(directory / INDEX_FILE)
    return files


def companion_files(model_files: Path) -> list[Path]:
    """The configuration, tokenizer and other small files beside the weights of a model."""
    if not (model_files / "config.json").is_file():
        raise ModelUnavailable(
            f"{model_files} has no config.json", hint="give the directory of a Hugging Face model"
        )
    return sorted(path for path in model_files.iterdir() if _is_companion(path))


def copy_files(sources: Iterable[Path], destination: Path) -> dict[str, FileEntry]:
    """Copies files (what links point to, not the links) and returns their entries."""
    files: dict[str, FileEntry] = {}
    for source in sources:
        copy = destination / source.name
        shutil.copyfile(source, copy)
        files[source.name] = file_entry(copy)
    return files


def _is_companion(path: Path) -> bool:
    return (
        path.is_file()
        and not path.name.startswith(".")
        and path.suffix not in _WEIGHT_SUFFIXES
        and not path.name.endswith(".index.json")
        and path.name != MANIFEST_FILE
    )


def _read_index(path: Path) -> _Index:
    try:
        index = msgspec.json.decode(path.read_bytes(), type=_Index)
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise DigestMismatch(f"{path} is not a valid index: {exc}") from exc
    strays = [name for name in index.weight_map.values() if Path(name).name != name]
    if strays:
        raise DigestMismatch(f"{path} names a shard outside its directory: {strays[0]!r}")
    return index


def _read_shards(directory: Path, index: _Index) -> dict[str, RawTensor]:
    tensors: dict[str, RawTensor] = {}
    for shard in sorted(set(index.weight_map.values())):
        if not (directory / shard).is_file():
            raise ModelUnavailable(
                f"{directory / shard} is missing", hint="download the model again"
            )
        tensors.update(read_safetensors(directory / shard))
    if tensors.keys() != index.weight_map.keys():
        differing = sorted(tensors.keys() ^ index.weight_map.keys())
        raise DigestMismatch(f"{directory}: index and shards disagree about {differing[0]!r}")
    return tensors


def _cut(tensors: Tensors, max_shard_bytes: int) -> list[dict[str, RawTensor]]:
    """Tensors in their order, in shards of at most `max_shard_bytes` (a larger one stands alone)."""
    shards: list[dict[str, RawTensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.data.nbytes > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.data.nbytes
    return shards
