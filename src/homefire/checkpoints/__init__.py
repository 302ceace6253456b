"""Checkpoints on raw bytes, without torch: the store, snapshots and states, deltas, lineage."""

from homefire.checkpoints.adapter_directory import AdapterDirectory, read_adapter_directory
from homefire.checkpoints.delta_codec import DeltaCodec, EncodedTensor, decode_tensor, encode_tensor
from homefire.checkpoints.directory_store import DirectoryStore
from homefire.checkpoints.dtypes import numpy_array, raw_tensor, round_to_bf16, to_float32
from homefire.checkpoints.file_digest import file_entry
from homefire.checkpoints.lineage import check_stands_alone, resolve_chain
from homefire.checkpoints.materialize import Held, Materialized, materialize
from homefire.checkpoints.model_directory import read_model_directory
from homefire.checkpoints.open_store import is_object_store, open_store
from homefire.checkpoints.promote import PromoteResult, PromoteSpec, promote
from homefire.checkpoints.removal import Doomed, RemovalResult, RemovalSpec
from homefire.checkpoints.retention import Verdict, decide, in_order_of_deletion
from homefire.checkpoints.safetensors_file import read_safetensors, write_safetensors
from homefire.checkpoints.snapshots import SnapshotInfo, write_base, write_delta, write_lora
from homefire.checkpoints.states import read_state, write_state
from homefire.checkpoints.store import CheckpointKey, CheckpointStore, Staged
from homefire.checkpoints.tiny import TINY_NAME, ensure_tiny
from homefire.wire.manifest import (
    CheckpointFamily,
    CheckpointKind,
    FileEntry,
    LoraManifest,
    Manifest,
    TensorEntry,
    whole_digest,
)
from homefire.wire.tensors import RawTensor, Tensors, digest_tensors, tensor_digest

__all__ = [
    "TINY_NAME",
    "AdapterDirectory",
    "CheckpointFamily",
    "CheckpointKey",
    "CheckpointKind",
    "CheckpointStore",
    "DeltaCodec",
    "DirectoryStore",
    "Doomed",
    "EncodedTensor",
    "FileEntry",
    "Held",
    "LoraManifest",
    "Manifest",
    "Materialized",
    "PromoteResult",
    "PromoteSpec",
    "RawTensor",
    "RemovalResult",
    "RemovalSpec",
    "SnapshotInfo",
    "Staged",
    "TensorEntry",
    "Tensors",
    "Verdict",
    "check_stands_alone",
    "decide",
    "decode_tensor",
    "digest_tensors",
    "encode_tensor",
    "ensure_tiny",
    "file_entry",
    "in_order_of_deletion",
    "is_object_store",
    "materialize",
    "numpy_array",
    "open_store",
    "promote",
    "raw_tensor",
    "read_adapter_directory",
    "read_model_directory",
    "read_safetensors",
    "read_state",
    "resolve_chain",
    "round_to_bf16",
    "tensor_digest",
    "to_float32",
    "whole_digest",
    "write_base",
    "write_delta",
    "write_lora",
    "write_safetensors",
    "write_state",
]
