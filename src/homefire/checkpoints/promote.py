"""Promotion: any sampler snapshot becomes a plain directory that needs nothing of homefire.

A base or a delta gives a Hugging Face directory, a LoRA snapshot a PEFT directory. It is long work, so
a worker process does it: `python -m homefire.checkpoints promote SPEC`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import msgspec

from homefire.checkpoints.materialize import Materialized, materialize
from homefire.checkpoints.model_directory import (
    companion_files,
    copy_files,
    read_model_directory,
    write_model,
)
from homefire.checkpoints.open_store import open_store
from homefire.checkpoints.progress import Report, report_to, unreported
from homefire.checkpoints.safetensors_file import read_safetensors, write_safetensors
from homefire.checkpoints.snapshots import ADAPTER_CONFIG_FILE, ADAPTER_FILE, CONFIG_FILE
from homefire.checkpoints.staging import remove_leftovers, staging_directory
from homefire.checkpoints.store import CheckpointKey, CheckpointStore
from homefire.foundation.durable import publish_directory, write_file
from homefire.wire.errors import (
    AlreadyExists,
    DigestMismatch,
    ErrorRecord,
    HomefireError,
    InternalError,
    StorageFailed,
)
from homefire.wire.manifest import CheckpointFamily, CheckpointKind, FileEntry, whole_digest
from homefire.wire.tensors import RawTensor, digest_tensors

log = logging.getLogger(__name__)


class PromoteSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One promotion; also the JSON that the worker is started with."""

    store_root: str
    account: str
    job: str
    slot: str
    identity: str
    base_model_dir: str
    """Where configuration and tokenizer come from."""
    destination: str
    """The directory to make. One that holds these very weights already is left as it is."""
    result_file: str
    """Where the worker leaves its `PromoteResult`."""
    progress_file: str = ""
    """Where it says how far it is; empty: nowhere."""


class PromoteResult(msgspec.Struct, frozen=True, kw_only=True):
    ok: bool
    kind: CheckpointKind | None = None
    """What was promoted."""
    size_bytes: int = 0
    """Of all files in the destination."""
    digest: str = ""
    """The snapshot's digest, checked on the files written."""
    error: ErrorRecord | None = None


def run_worker(spec_file: Path) -> int:
    """The worker's whole life: 0 when promoted, 1 when not; the result file says which and why."""
    spec = msgspec.json.decode(spec_file.read_bytes(), type=PromoteSpec)
    result = _attempt(spec)
    write_file(Path(spec.result_file), msgspec.json.encode(result))
    return 0 if result.ok else 1


def promote(spec: PromoteSpec) -> PromoteResult:
    """Makes `spec.destination`, whole or not at all, and checks the digest of what was written.

    AlreadyExists when the destination holds something else; the errors of `materialize`.
    """
    key = CheckpointKey(spec.account, spec.job, spec.slot, CheckpointFamily.SAMPLER, spec.identity)
    store = open_store(spec.store_root)
    report = report_to(Path(spec.progress_file)) if spec.progress_file else unreported
    base_model = Path(spec.base_model_dir)
    return make_directory(store, key, Path(spec.destination), base_model=base_model, report=report)


def make_directory(
    store: CheckpointStore,
    key: CheckpointKey,
    destination: Path,
    *,
    base_model: Path,
    report: Report = unreported,
) -> PromoteResult:
    """`base_model` is the directory whose configuration and tokenizer a delta takes."""
    snapshot = materialize(store, key.account, key.job, key.slot, key.name, report=report)
    report("writing the model", 0, 1)
    if destination.exists():
        _check_same(destination, snapshot)
    else:
        _make(destination, snapshot, store.directory(key), base_model)
    report("writing the model", 1, 1)
    return PromoteResult(
        ok=True,
        kind=snapshot.manifest.kind,
        size_bytes=sum(path.stat().st_size for path in destination.iterdir()),
        digest=snapshot.manifest.digest,
    )


def _attempt(spec: PromoteSpec) -> PromoteResult:
    try:
        return promote(spec)
    except HomefireError as exc:
        error = exc
    except OSError as exc:
        error = StorageFailed(f"promotion of {spec.identity!r} failed: {exc}")
    except Exception as exc:  # the worker's boundary: control must learn of it
        log.exception("promotion of %r failed", spec.identity)
        error = InternalError(f"{type(exc).__name__}: {exc}", hint="see the worker's log")
    return PromoteResult(ok=False, error=ErrorRecord.of(error))


def _make(
    destination: Path, snapshot: Materialized, snapshot_directory: Path, base_model: Path
) -> None:
    remove_leftovers(destination.parent)
    with staging_directory(destination.parent) as staged:
        if snapshot.manifest.kind is CheckpointKind.LORA:
            _write_adapter(staged, snapshot.tensors, snapshot_directory)
        else:
            write_model(staged, snapshot.tensors)
            copy_files(companion_files(_model_files(snapshot_directory, base_model)), staged)
        if _digest(staged) != snapshot.manifest.digest:
            raise DigestMismatch(f"{destination} was not written as {snapshot.manifest.identity!r}")
        publish_directory(staged, destination)


def _model_files(snapshot_directory: Path, base_model: Path) -> Path:
    """A base snapshot has a configuration of its own, and may differ from the base model's: where an
    adapter of a tied head was merged, it is no longer tied."""
    return snapshot_directory if (snapshot_directory / CONFIG_FILE).is_file() else base_model


def _write_adapter(
    directory: Path, tensors: Mapping[str, RawTensor], snapshot_directory: Path
) -> dict[str, FileEntry]:
    files = {ADAPTER_FILE: write_safetensors(directory / ADAPTER_FILE, tensors, {"format": "pt"})}
    return files | copy_files([snapshot_directory / ADAPTER_CONFIG_FILE], directory)


def _check_same(destination: Path, snapshot: Materialized) -> None:
    """A worker that died after publishing is started again; that must succeed."""
    try:
        found = _digest(destination)
    except HomefireError:
        found = "unreadable"
    if found != snapshot.manifest.digest:
        raise AlreadyExists(
            f"{destination} exists and does not hold snapshot {snapshot.manifest.identity!r}",
            hint="choose another name, or delete what is there first",
        )


def _digest(directory: Path) -> str:
    adapter = directory / ADAPTER_FILE
    tensors = read_safetensors(adapter) if adapter.exists() else read_model_directory(directory)
    return whole_digest(digest_tensors(tensors))
