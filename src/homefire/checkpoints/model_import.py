"""A Hugging Face directory becomes a base model of this home: checked, digested, committed whole.

The copy has a manifest with the digest of every tensor and file, so that it can be verified later like
any checkpoint. A manifest's presence is what says that the import is complete.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np

from homefire import __version__
from homefire.checkpoints.dtypes import ITEM_BYTES, bit_patterns
from homefire.checkpoints.file_digest import file_entry, verify_files
from homefire.checkpoints.manifest_file import encode_manifest, read_manifest
from homefire.checkpoints.model_directory import (
    INDEX_FILE,
    WEIGHTS_FILE,
    companion_files,
    read_model_directory,
)
from homefire.checkpoints.progress import Report, unreported
from homefire.checkpoints.snapshots import ADAPTER_CONFIG_FILE, CONFIG_FILE
from homefire.checkpoints.staging import remove_leftovers, staging_directory
from homefire.foundation.durable import publish_directory, write_file
from homefire.wire.errors import (
    AlreadyExists,
    DigestMismatch,
    InvalidArgument,
    ModelUnavailable,
    StorageFailed,
    Unsupported,
)
from homefire.wire.ids import check_name
from homefire.wire.manifest import (
    MANIFEST_FILE,
    CheckpointKind,
    FileEntry,
    Manifest,
    TensorEntry,
    whole_digest,
)
from homefire.wire.tensors import RawTensor, tensor_digest

IMPORTED_JOB = "imported"
"""What an import's manifest has in the place of a job."""
TOKENIZER_FILE = "tokenizer.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_EXPONENTS = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}
"""The bits that are all set in NaN and infinity, and in no other number."""
_CHECK_ELEMENTS = 4 << 20
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")


class _Config(msgspec.Struct, frozen=True):
    model_type: str = ""
    vocab_size: int | None = None
    hidden_size: int | None = None
    auto_map: dict[str, Any] | None = None
    quantization_config: dict[str, Any] | None = None
    text_config: dict[str, Any] | None = None


@dataclass(frozen=True)
class Imported:
    manifest: Manifest
    directory: Path
    was_there: bool
    """The same model had been imported before."""


def import_model(
    source: Path,
    destination: Path,
    *,
    origin: str,
    created_at: float,
    report: Report = unreported,
) -> Imported:
    """Makes `destination` from the model in `source`, whole or not at all.

    `origin` says where it came from, e.g. `Qwen/Qwen3-0.6B@c1899de…`. The same weights again succeed.
    InvalidArgument, Unsupported, ModelUnavailable or DigestMismatch name what does not fit;
    AlreadyExists when the destination is something else.
    """
    name = check_name(destination.name, field="name")
    _check_config(source)
    files = _files_to_copy(source)
    tensors = _checked_tensors(source, report)
    if destination.exists():
        return Imported(_same(destination, tensors), destination, was_there=True)
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(destination.parent)
        with staging_directory(destination.parent) as staged:
            entries = _copy(files, staged, report)
            manifest = _manifest(name, origin, tensors, entries, created_at)
            _check_copy(staged, tensors)
            write_file(staged / MANIFEST_FILE, encode_manifest(manifest))
            publish_directory(staged, destination)
    except OSError as exc:
        raise StorageFailed(
            f"{source} could not be imported as {name!r}: {exc}",
            hint="check the free space of the home's disk, then import again",
        ) from exc
    return Imported(manifest, destination, was_there=False)


def verify_import(directory: Path) -> Manifest:
    """Every file and tensor again; DigestMismatch names what changed, ModelUnavailable no import."""
    try:
        manifest = read_manifest(directory)
    except (FileNotFoundError, NotADirectoryError) as exc:
        raise ModelUnavailable(
            f"{directory} was not imported", hint="import it with `homefire checkpoint import`"
        ) from exc
    verify_files(directory, manifest)
    tensors = {name: _entry(tensor) for name, tensor in read_model_directory(directory).items()}
    if tensors != manifest.tensors or whole_digest(tensors) != manifest.digest:
        raise DigestMismatch(f"the tensors in {directory} are not those of its manifest")
    return manifest


def _check_config(source: Path) -> None:
    if (source / ADAPTER_CONFIG_FILE).is_file() and not (source / CONFIG_FILE).is_file():
        raise Unsupported(
            f"{source} is a PEFT adapter, not a base model",
            hint="import its base model, and give the adapter to load_adapter",
            field="source",
        )
    if not (source / CONFIG_FILE).is_file():
        raise ModelUnavailable(
            f"{source} has no {CONFIG_FILE}", hint="give the directory of a Hugging Face model"
        )
    try:
        config = msgspec.json.decode((source / CONFIG_FILE).read_bytes(), type=_Config)
    except msgspec.DecodeError as exc:
        raise InvalidArgument(f"{source / CONFIG_FILE} is damaged: {exc}", field="source") from exc
    if not config.model_type:
        raise InvalidArgument(f"{source / CONFIG_FILE} names no model_type", field="source")
    if config.auto_map:
        raise Unsupported(
            f"{source} brings its own code (auto_map in {CONFIG_FILE}), which is never run here",
            hint="use a model whose architecture is part of transformers",
            field="source",
        )
    if config.quantization_config:
        method = config.quantization_config.get("quant_method", "unknown")
        raise Unsupported(
            f"{source} is quantized ({method}): its weights cannot be trained as they are",
            hint="import the unquantized model",
            field="source",
        )
    if not (source / TOKENIZER_FILE).is_file():
        raise InvalidArgument(
            f"{source} has no {TOKENIZER_FILE}",
            hint="save its fast tokenizer there: AutoTokenizer.from_pretrained(...)"
            ".save_pretrained(...)",
            field="source",
        )
    _check_tokenizer(source / TOKENIZER_FILE)


def _check_tokenizer(path: Path) -> None:
    try:
        parsed = json.loads(path.read_bytes())
    except (ValueError, UnicodeDecodeError) as exc:
        raise InvalidArgument(f"{path} is damaged: {exc}", field="source") from exc
    if not isinstance(parsed, dict) or "model" not in parsed:
        raise InvalidArgument(f"{path} is no tokenizer: it has no `model`", field="source")


def _files_to_copy(source: Path) -> list[Path]:
    weights = [source / WEIGHTS_FILE] if (source / WEIGHTS_FILE).is_file() else []
    if not weights:
        index = source / INDEX_FILE
        if not index.is_file():
            raise _no_safetensors(source)
        named = msgspec.json.decode(index.read_bytes(), type=dict[str, Any]).get("weight_map", {})
        weights = [index, *(source / name for name in sorted(set(named.values())))]
    return [*weights, *companion_files(source)]


def _no_safetensors(source: Path) -> Unsupported | ModelUnavailable:
    pickles = sorted(path.name for pattern in _PICKLES for path in source.glob(pattern))
    if pickles:
        return Unsupported(
            f"{source} has its weights as pickles ({pickles[0]}), which are never read here",
            hint="save them with save_pretrained(..., safe_serialization=True)",
            field="source",
        )
    return ModelUnavailable(
        f"{source} has neither {WEIGHTS_FILE} nor {INDEX_FILE}",
        hint="give a directory that save_pretrained wrote with safe serialization",
    )


def _checked_tensors(source: Path, report: Report) -> dict[str, TensorEntry]:
    """Of every tensor its entry, after a look at dtype, shape and values."""
    tensors = read_model_directory(source)
    if not tensors:
        raise InvalidArgument(f"{source} holds no tensors", field="source")
    _check_embedding(source, tensors)
    total, done = sum(t.data.nbytes for t in tensors.values()), 0
    entries: dict[str, TensorEntry] = {}
    for name, tensor in tensors.items():
        _check_values(source, name, tensor)
        entries[name] = _entry(tensor)
        done += tensor.data.nbytes
        report("checking", done, total)
    return entries


def _check_values(source: Path, name: str, tensor: RawTensor) -> None:
    if tensor.dtype.startswith("F8"):
        raise Unsupported(
            f"tensor {name!r} of {source} is {tensor.dtype}",
            hint="import the unquantized model, in bfloat16, float16 or float32",
            field="source",
        )
    if not _is_finite(tensor):
        raise InvalidArgument(f"tensor {name!r} of {source} holds NaN or infinity", field="source")


def _is_finite(tensor: RawTensor) -> bool:
    exponent = _EXPONENTS.get(tensor.dtype)
    if exponent is None:
        return True
    bits = bit_patterns(tensor, ITEM_BYTES[tensor.dtype])
    pieces = (bits[at : at + _CHECK_ELEMENTS] for at in range(0, bits.size, _CHECK_ELEMENTS))
    return not any(bool(np.any((piece & exponent) == exponent)) for piece in pieces)


def _check_embedding(source: Path, tensors: Mapping[str, RawTensor]) -> None:
    """The tensors are the configuration's: the one shape that every architecture has alike."""
    config = msgspec.json.decode((source / CONFIG_FILE).read_bytes(), type=dict[str, Any])
    text = cast(dict[str, Any], config.get("text_config") or config)
    vocabulary, hidden = text.get("vocab_size"), text.get("hidden_size")
    for name, tensor in tensors.items():
        if not name.endswith(_EMBEDDINGS) or len(tensor.shape) != 2 or not vocabulary:
            continue
        if tensor.shape[0] != vocabulary or (hidden and tensor.shape[1] > hidden):
            raise InvalidArgument(
                f"tensor {name!r} of {source} has shape {tuple(tensor.shape)}, "
                f"{CONFIG_FILE} says vocab_size {vocabulary}, hidden_size {hidden}",
                hint="weights and configuration are of different models",
                field="source",
            )
        return


def _copy(files: list[Path], staged: Path, report: Report) -> dict[str, FileEntry]:
    total, done = sum(path.stat().st_size for path in files), 0
    entries: dict[str, FileEntry] = {}
    for path in files:
        copy = staged / check_name(path.name, field="source")
        shutil.copyfile(path, copy)
        entries[path.name] = file_entry(copy)
        done += entries[path.name].size_bytes
        report("copying", done, total)
    return entries


def _check_copy(staged: Path, expected: Mapping[str, TensorEntry]) -> None:
    """The source may have changed while it was copied."""
    found = {name: _entry(tensor) for name, tensor in read_model_directory(staged).items()}
    if found != dict(expected):
        raise DigestMismatch(
            "the model changed while it was imported", hint="import it again when it is at rest"
        )


def _manifest(
    name: str,
    origin: str,
    tensors: dict[str, TensorEntry],
    files: dict[str, FileEntry],
    created_at: float,
) -> Manifest:
    return Manifest(
        identity=name,
        kind=CheckpointKind.BASE,
        account="local",
        job=IMPORTED_JOB,
        slot="base",
        step=0,
        base_model=origin,
        created_at=created_at,
        tensors=tensors,
        digest=whole_digest(tensors),
        files=files,
        size_bytes=sum(entry.size_bytes for entry in files.values()),
        num_elements=sum(int(np.prod(entry.shape)) for entry in tensors.values()),
        metadata={"origin": origin},
        homefire_version=__version__,
    )


def _same(destination: Path, tensors: dict[str, TensorEntry]) -> Manifest:
    try:
        manifest = read_manifest(destination)
    except FileNotFoundError:
        manifest = None
    if manifest is None or manifest.digest != whole_digest(tensors):
        raise AlreadyExists(
            f"{destination} exists and holds another model",
            hint="import under another name with --as, or delete what is there",
            field="name",
        )
    verify_files(destination, manifest)
    return manifest


def _entry(tensor: RawTensor) -> TensorEntry:
    return TensorEntry(tensor.dtype, tuple(tensor.shape), tensor_digest(tensor))
