"""The manifest of a checkpoint: written last, so that a checkpoint without one does not exist.

A manifest attests what is in memory after applying the checkpoint, not the bytes of its files: each
tensor entry digests the *full* tensor (little-endian raw bytes in its dtype), for deltas too.
"""

from __future__ import annotations

import hashlib
from enum import StrEnum

import msgspec

MANIFEST_FILE = "manifest.json"
MANIFEST_FORMAT = 1


class CheckpointKind(StrEnum):
    """What a checkpoint directory holds."""

    BASE = "base"
    """All parameters in the serving dtype: an ordinary Hugging Face directory."""
    DELTA = "delta"
    """Only the elements whose bits differ from the parent snapshot."""
    LORA = "lora"
    """An adapter: an ordinary PEFT directory, float32."""
    STATE = "state"
    """Float32 masters and optimizer: what load_state takes."""


class CheckpointFamily(StrEnum):
    """The name spaces of a slot; also the directory's name."""

    SAMPLER = "sampler"
    """Snapshots to serve."""
    STATE = "state"
    """Training states."""
    EXTERNAL = "external"
    """Weights written to be taken elsewhere: a PEFT or Hugging Face directory."""


class TensorEntry(msgspec.Struct, frozen=True):
    """Example: TensorEntry("BF16", (128, 128), "9f86d0…")."""

    dtype: str
    """safetensors' name: BF16, F16, F32, F64, I64, …"""
    shape: tuple[int, ...]
    digest: str
    """SHA-256, hex, of the full tensor's bytes."""


class FileEntry(msgspec.Struct, frozen=True):
    size_bytes: int
    sha256: str


class LoraManifest(msgspec.Struct, frozen=True):
    rank: int
    alpha: float
    seed: int | None = None
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = True


class Canary(msgspec.Struct, frozen=True):
    """What the engine that wrote a snapshot gives a fixed text, for whoever loads it to compare.

    Example: Canary([11, 305, 21], [-5.77, -5.81], [-5.77, -5.8], "float32").
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Of every token but the first, under the snapshot."""
    parent_logprobs: tuple[float, ...] | None
    """The same under the snapshot that was saved before it in its slot, at first the base model."""
    compute_dtype: str
    """What they were computed in, e.g. `float32`."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    format: int = MANIFEST_FORMAT
    identity: str
    kind: CheckpointKind
    account: str
    job: str
    slot: str
    step: int
    parent: str | None = None
    """The snapshot a delta applies to, in the same slot."""
    parent_digest: str | None = None
    base_model: str
    created_at: float
    """Unix time in seconds."""
    tensors: dict[str, TensorEntry]
    digest: str
    """`whole_digest(tensors)`: the digest that completions name."""
    files: dict[str, FileEntry]
    size_bytes: int
    num_changed: int = 0
    num_elements: int = 0
    lora: LoraManifest | None = None
    canary: Canary | None = None
    """None for what nobody computed with when it was saved: a merged model, a training state."""
    expires_at: float | None = None
    """Unix time in seconds. Like `public` and `pinned` it may change after the commit; nothing else does."""
    metadata: dict[str, str] = {}
    homefire_version: str = ""
    external: bool = False
    """It belongs to the family EXTERNAL; its kind says what the directory is."""
    public: bool = False
    """Other accounts may load it."""
    pinned: bool = False
    """It neither expires nor is pruned. May change after the commit, as `expires_at` may."""

    @property
    def family(self) -> CheckpointFamily:
        if self.external:
            return CheckpointFamily.EXTERNAL
        is_state = self.kind is CheckpointKind.STATE
        return CheckpointFamily.STATE if is_state else CheckpointFamily.SAMPLER

    def has_expired(self, now: float) -> bool:
        """From then on it is neither listed nor loaded by name; pruning deletes it."""
        return not self.pinned and self.expires_at is not None and self.expires_at <= now


def whole_digest(tensors: dict[str, TensorEntry]) -> str:
    """SHA-256 over the tensors' names, dtypes, shapes and digests, sorted by name."""
    hasher = hashlib.sha256()
    for name in sorted(tensors):
        entry = tensors[name]
        shape = ",".join(map(str, entry.shape))
        hasher.update(f"{name}\0{entry.dtype}\0{shape}\0{entry.digest}\n".encode())
    return hasher.hexdigest()


def weights_header(identity: str, digest: str) -> str:
    """The value of `x-homefire-weights`, e.g. `step_00010-4b50536f; sha=9f86d081884c7d65`."""
    return f"{identity}; sha={digest}"
