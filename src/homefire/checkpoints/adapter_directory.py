"""PEFT directories: an adapter's tensors and its configuration, ours or anybody's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec

from homefire.checkpoints.safetensors_file import read_safetensors
from homefire.checkpoints.snapshots import ADAPTER_CONFIG_FILE, ADAPTER_FILE
from homefire.wire.errors import DigestMismatch, InvalidArgument
from homefire.wire.manifest import whole_digest
from homefire.wire.peft import AdapterConfig, refuse_base_weights
from homefire.wire.tensors import RawTensor, digest_tensors


@dataclass(frozen=True)
class AdapterDirectory:
    config: AdapterConfig
    tensors: dict[str, RawTensor]
    """Views of the file, in whatever dtype it has."""

    @property
    def digest(self) -> str:
        return whole_digest(digest_tensors(self.tensors))


def read_adapter_directory(directory: Path) -> AdapterDirectory:
    """InvalidArgument when a file is missing or damaged, Unsupported for other kinds of adapters."""
    try:
        config = msgspec.json.decode(
            (directory / ADAPTER_CONFIG_FILE).read_bytes(), type=AdapterConfig
        )
        tensors = read_safetensors(directory / ADAPTER_FILE)
    except (FileNotFoundError, NotADirectoryError) as exc:
        raise InvalidArgument(
            f"{directory} is no PEFT directory",
            hint=f"it must hold {ADAPTER_CONFIG_FILE} and {ADAPTER_FILE}",
            field="adapter_path",
        ) from exc
    except (msgspec.DecodeError, DigestMismatch) as exc:
        raise InvalidArgument(
            f"the adapter in {directory} is damaged: {exc}", field="adapter_path"
        ) from exc
    config.refuse_other_adapters()
    refuse_base_weights(tensors)
    return AdapterDirectory(config, tensors)
