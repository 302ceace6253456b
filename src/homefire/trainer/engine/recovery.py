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
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import msgspec

from homefire.checkpoints import FileEntry, Tensors, read_safetensors, write_safetensors
from homefire.checkpoints.file_digest import file_entry
from homefire.foundation.durable import publish_directory
from homefire.trainer.engine.saves import PreparedSave, num_bytes, owned
from homefire.trainer.engine.slots import Accumulated, Slot
from homefire.wire.engine import LoraSpec, RecoverySaved, SlotKind, SlotOpened
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


def prepare_recovery(directory: Path, slots: list[Slot]) -> PreparedSave[RecoverySaved]:
    """Published whole and durable as `directory`, or not at all."""
    if directory.exists():
        raise FailedPrecondition(f"recovery point {directory} exists already")
    live = [_take(slot) for slot in slots]

    def write(taken: list[_Taken]) -> RecoverySaved:
        size_bytes = write_recovery(directory, taken)
        return RecoverySaved(size_bytes=size_bytes, slots=[each.opened for each in taken])

    return PreparedSave(
        sum(num_bytes(*each.parts.values()) for each in live),
        write=partial(write, live),
        keep=lambda: partial(write, [_own(each) for each in live]),
    )


@dataclass(frozen=True)
class _Taken:
    """A slot as it was when its bytes were taken."""

    slot: Slot
    """Only for its parent snapshot: it is known when the saves before this one are written."""
    opened: SlotOpened
    accumulated: Accumulated
    parts: dict[str, Tensors]


def write_recovery(directory: Path, taken: list[_Taken]) -> int:
    """The size in bytes."""
    aside = directory.with_name(f".{directory.name}.{secrets.token_hex(4)}.tmp")
    try:
        aside.mkdir(parents=True)
        files = {name: entry for each in taken for name, entry in _write_slot(aside, each)}
        record = RecoveryRecord(slots=[_record(each) for each in taken], files=files)
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


def _take(slot: Slot) -> _Taken:
    """Views of the live weights."""
    parts: dict[str, Tensors] = {}
    if slot.trained is not None:
        held = slot.trained.files()
        parts = dict(zip(_PARTS, (held.masters, held.optimizer, held.gradient), strict=True))
    return _Taken(slot, slot.opened(), slot.accumulated, parts)


def _own(taken: _Taken) -> _Taken:
    return replace(taken, parts={part: owned(tensors) for part, tensors in taken.parts.items()})


def _write_slot(directory: Path, taken: _Taken) -> list[tuple[str, FileEntry]]:
    return [
        (name, write_safetensors(directory / name, tensors))
        for part, tensors in taken.parts.items()
        if tensors and (name := _file_name(taken.opened.slot, part))
    ]


def _file_name(slot: str, part: str) -> str:
    return f"{slot}.{part}.safetensors"


def _record(taken: _Taken) -> SlotRecord:
    opened, accumulated, committed = taken.opened, taken.accumulated, taken.slot.committed
    return SlotRecord(
        name=opened.slot,
        kind=opened.kind,
        lora=opened.lora,
        step=opened.step,
        num_backward_calls=accumulated.num_backward_calls,
        num_loss_tokens=accumulated.num_loss_tokens,
        num_sequences=accumulated.num_sequences,
        parent=committed.manifest if committed else None,
    )
