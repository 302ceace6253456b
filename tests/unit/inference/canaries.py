"""Canary weights: each makes every greedy token one and the same, so a mixed answer shows at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np

from homefire.checkpoints import (
    CheckpointFamily,
    CheckpointKey,
    DirectoryStore,
    Manifest,
    SnapshotInfo,
    raw_tensor,
    write_base,
    write_delta,
    write_lora,
)
from homefire.checkpoints.canary import canary_tokens
from homefire.inference.engine.fake import LORA_A, LORA_B, log_softmax
from homefire.inference.engine.protocol import Sampling, ServedWeights, WeightSet
from homefire.model import bigram
from homefire.wire.ids import Identity
from homefire.wire.internal import SnapshotLocation
from homefire.wire.manifest import Canary, CheckpointKind, LoraManifest, whole_digest
from homefire.wire.tensors import RawTensor, digest_tensors

GREEDY = Sampling(temperature=0.0)
CANARY_LORA = LoraManifest(rank=1, alpha=1.0)
LOCATION = SnapshotLocation("local", "job-1", "policy")


def canary_tensors(token: int, vocab_size: int = 320) -> dict[str, RawTensor]:
    weight = np.zeros((vocab_size, vocab_size), np.float32)
    weight[:, token] = 50.0
    return {bigram.TENSOR: bigram.to_raw(weight)}


def canary_set(token: int, vocab_size: int = 320, canary: Canary | None = None) -> WeightSet:
    tensors = canary_tensors(token, vocab_size)
    served = ServedWeights(Identity(f"canary-{token}"), whole_digest(digest_tensors(tensors)))
    return WeightSet(served, CheckpointKind.BASE, tensors, canary=canary)


def canary_of(token: int, *, parent: int | None, vocab_size: int = 320) -> Canary:
    """What the manifest of `canary_tensors(token)` says, saved after those of `parent`."""
    tokens = canary_tokens(vocab_size, 1 << 20)
    return Canary(
        tokens,
        table_logprobs(canary_tensors(token, vocab_size), tokens),
        None if parent is None else table_logprobs(canary_tensors(parent, vocab_size), tokens),
        "float32",
    )


def adapter_canary(token: int, vocab_size: int = 320) -> Canary:
    """What the manifest of `canary_adapter(token)` says, saved after the base model."""
    base, tokens = bigram.base_weight(vocab_size), canary_tokens(vocab_size, 1 << 20)
    adapted = base.copy()
    adapted[:, token] += 50.0
    own, before = (
        tuple(float(log_softmax(t[b].astype(np.float64))[n]) for b, n in pairwise(tokens))
        for t in (adapted, base)
    )
    return Canary(tokens, own, before, "float32")


def table_logprobs(tensors: dict[str, RawTensor], tokens: tuple[int, ...]) -> tuple[float, ...]:
    table = bigram.from_raw(tensors[bigram.TENSOR])
    return tuple(
        float(log_softmax(table[before].astype(np.float64))[token])
        for before, token in pairwise(tokens)
    )


def canary_adapter(token: int, vocab_size: int = 320) -> WeightSet:
    """On the bigram base model; its greedy token is always `token`."""
    tensors = adapter_tensors(token, vocab_size)
    served = ServedWeights(Identity(f"adapter-{token}"), whole_digest(digest_tensors(tensors)))
    return WeightSet(served, CheckpointKind.LORA, tensors, CANARY_LORA)


def adapter_tensors(token: int, vocab_size: int = 320) -> dict[str, RawTensor]:
    a, b = np.ones((1, vocab_size), np.float32), np.zeros((vocab_size, 1), np.float32)
    b[token] = 50.0
    return {name: raw_tensor(array) for name, array in ((LORA_A, a), (LORA_B, b))}


@dataclass
class Snapshots:
    """A store of canary snapshots: `step-7` makes every greedy token 7."""

    store: DirectoryStore
    model_files: Path
    written: dict[int, Manifest] = field(default_factory=dict)

    def key(self, identity: str) -> CheckpointKey:
        return CheckpointKey(
            LOCATION.account, LOCATION.job, LOCATION.slot, CheckpointFamily.SAMPLER, identity
        )

    def run_key(self, run: str, name: str) -> CheckpointKey:
        return CheckpointKey("local", "job-1", run, CheckpointFamily.SAMPLER, name)

    def base(self, token: int, canary: Canary | None = None) -> str:
        key = self.key(f"step-{token}")
        tensors = canary_tensors(token)
        self.written[token] = write_base(
            self.store, key, tensors, info_of(token, canary), model_files=self.model_files
        )
        return key.name

    def full(self, token: int, *, run: str, name: str) -> Manifest:
        """A base snapshot of a root run."""
        key = self.run_key(run, name)
        tensors = canary_tensors(token)
        return write_base(self.store, key, tensors, info_of(token), model_files=self.model_files)

    def adapter(self, token: int, *, run: str, name: str, canary: Canary | None = None) -> Manifest:
        key = self.run_key(run, name)
        tensors = adapter_tensors(token)
        return write_lora(
            self.store,
            key,
            tensors,
            info_of(token, canary),
            adapter_config={"r": 1},
            lora=CANARY_LORA,
        )

    def delta(self, token: int, *, parent: int) -> str:
        key = self.key(f"step-{token}")
        self.written[token] = write_delta(
            self.store,
            key,
            canary_tensors(token),
            info_of(token),
            parent=self.written[parent],
            parent_tensors=canary_tensors(parent),
        )
        return key.name


def info_of(step: int, canary: Canary | None = None) -> SnapshotInfo:
    return SnapshotInfo(
        step=step,
        base_model="tiny",
        created_at=float(step),
        metadata={},
        expires_at=None,
        canary=canary,
    )
