"""Recovery points: every slot with optimizer, unapplied gradient and parent, in one directory.

recovery.json                  what is here: `RecoveryRecord`, with each file's size and SHA-256
<slot>.masters.safetensors     float32
<slot>.optimizer.safetensors
<slot>.gradient.safetensors    only when something is accumulated
"""

from __future__ import annotations

import logging
import secrets
import shutil
from pathlib import Path

import msgspec

from homefire.checkpoints import FileEntry, Tensors, read_safetensors, write_safetensors
from homefire.checkpoints.file_digest import file_entry
from homefire.foundation.durable import publish_directory
from homefire.trainer.engine.slots import Accumulated, Slot
from homefire.wire.engine import LoraSpec, SlotKind
from homefire.wire.errors import DigestMismatch, FailedPrecondition, StorageFailed
from homefire.wire.manifest import Manifest

log = logging.getLogger(__name__)
RECORD_FILE = "recovery.json"
_FORMAT = 1
_PARTS = ("masters", "optimizer", "gradient")


class SlotRecord(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    kind: SlotKind
    lora: LoraSpec | None
    step: int
    num_backward_calls: int
    num_loss_tokens: int
    num_sequences: int
    parent: Manifest | None
    """The last committed snapshot; its bits stay in the store."""

    def accumulated(self) -> Accumulated:
        return Accumulated(self.num_backward_calls, self.num_loss_tokens, self.num_sequences)


class RecoveryRecord(msgspec.Struct, frozen=True, kw_only=True):
    format: int = _FORMAT
    slots: list[SlotRecord]
    files: dict[str, FileEntry]


def write_recovery(directory: Path, slots: list[Slot]) -> int:
    """Publishes the directory whole and durable, or not at all; returns its size in bytes."""
    if directory.exists():
        raise FailedPrecondition(f"recovery point {directory} exists already")
    aside = directory.with_name(f".{directory.name}.{secrets.token_hex(4)}.tmp")
    try:
        aside.mkdir(parents=True)
        files = {name: entry for slot in slots for name, entry in _write_slot(aside, slot)}
        record = RecoveryRecord(slots=[_record(slot) for slot in slots], files=files)
        (aside / RECORD_FILE).write_bytes(msgspec.json.encode(record))
        publish_directory(aside, directory)
    except OSError as exc:
        raise StorageFailed(f"recovery point {directory} could not be written: {exc}") from exc
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return sum(entry.size_bytes for entry in files.values())


def read_recovery(directory: Path) -> RecoveryRecord:
    """The record, after every file was checked against it; DigestMismatch names what is damaged."""
    try:
        data = (directory / RECORD_FILE).read_bytes()
        record = msgspec.json.decode(data, type=RecoveryRecord)
    except OSError as exc:
        raise DigestMismatch(f"{directory} is not a recovery point: {exc}") from exc
    except msgspec.DecodeError as exc:
        raise DigestMismatch(f"{directory / RECORD_FILE} is damaged: {exc}") from exc
    if record.format != _FORMAT:
        raise DigestMismatch(f"{directory} has format {record.format}, known is {_FORMAT}")
    for name, expected in record.files.items():
        path = directory / name
        if not path.is_file() or file_entry(path) != expected:
            raise DigestMismatch(f"{path} is missing or damaged")
    return record


def read_part(directory: Path, record: RecoveryRecord, slot: str, part: str) -> Tensors:
    """One of masters, optimizer, gradient; empty when the slot had none."""
    name = _file_name(slot, part)
    return read_safetensors(directory / name) if name in record.files else {}


def _write_slot(directory: Path, slot: Slot) -> list[tuple[str, FileEntry]]:
    if slot.trained is None:
        return []
    held = slot.trained.files()
    parts = zip(_PARTS, (held.masters, held.optimizer, held.gradient), strict=True)
    return [
        (name, write_safetensors(directory / name, tensors))
        for part, tensors in parts
        if tensors and (name := _file_name(slot.name, part))
    ]


def _file_name(slot: str, part: str) -> str:
    return f"{slot}.{part}.safetensors"


def _record(slot: Slot) -> SlotRecord:
    return SlotRecord(
        name=slot.name,
        kind=slot.kind,
        lora=slot.lora,
        step=slot.step,
        num_backward_calls=slot.accumulated.num_backward_calls,
        num_loss_tokens=slot.accumulated.num_loss_tokens,
        num_sequences=slot.accumulated.num_sequences,
        parent=slot.committed.manifest if slot.committed else None,
    )
