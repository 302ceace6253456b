from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from homefire.checkpoints import (
    CheckpointFamily,
    CheckpointKey,
    DirectoryStore,
    LoraManifest,
    Manifest,
    RawTensor,
    SnapshotInfo,
    Tensors,
    raw_tensor,
    round_to_bf16,
    write_base,
    write_delta,
    write_lora,
    write_state,
)
from homefire.foundation.clock import ManualClock

BUCKET = ("local", "job-1", "policy")


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def store(tmp_path, clock) -> DirectoryStore:
    return DirectoryStore(tmp_path / "store", clock)


@pytest.fixture
def model_files(tmp_path) -> Path:
    """What surrounds the weights of a model, with some things that must not travel."""
    directory = tmp_path / "model-files"
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "qwen3"}')
    (directory / "tokenizer.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(b"other weights")
    (directory / "pytorch_model.bin").write_bytes(b"a pickle")
    (directory / ".gitattributes").write_text("hidden")
    return directory


@pytest.fixture
def make_key() -> Callable[..., CheckpointKey]:
    def make(name: str, family: CheckpointFamily = CheckpointFamily.SAMPLER) -> CheckpointKey:
        return CheckpointKey(*BUCKET, family, name)

    return make


@pytest.fixture
def make_tensors() -> Callable[..., dict[str, RawTensor]]:
    def make(seed: int = 0) -> dict[str, RawTensor]:
        generator = np.random.default_rng(seed)
        return {
            "embed.weight": round_to_bf16(generator.normal(size=(40, 8)).astype(np.float32)),
            "norm.weight": round_to_bf16(np.ones(8, np.float32)),
            "scale": raw_tensor(generator.normal(size=()).astype(np.float32)),
            "steps": raw_tensor(np.arange(5, dtype=np.int64)),
        }

    return make


@pytest.fixture
def nudge() -> Callable[..., dict[str, RawTensor]]:
    """Tensors as an optimizer step leaves them: a few elements of one tensor moved by one ulp."""

    def make(tensors: Tensors, seed: int = 0, name: str = "embed.weight") -> dict[str, RawTensor]:
        bits = tensors[name].data.view("<u2").copy()
        moved = np.random.default_rng(seed).choice(bits.size, size=7, replace=False)
        bits[moved] += np.uint16(1)
        changed = RawTensor(tensors[name].dtype, tensors[name].shape, bits.view(np.uint8))
        return {**tensors, name: changed}

    return make


@dataclass
class Trainer:
    """Publishes snapshots into one slot as a trainer does, and remembers what each one holds."""

    store: DirectoryStore
    model_files: Path
    make_key: Callable[..., CheckpointKey]
    clock: ManualClock

    def __post_init__(self) -> None:
        self.published: dict[str, dict[str, RawTensor]] = {}

    def info(self, **fields) -> SnapshotInfo:
        self.clock.advance(1.0)
        return SnapshotInfo(
            step=len(self.published), base_model="tiny", created_at=self.clock.now(), **fields
        )

    def base(self, name: str, tensors: dict[str, RawTensor], **fields) -> Manifest:
        self.published[name] = tensors
        key = self.make_key(name)
        return write_base(
            self.store, key, tensors, self.info(**fields), model_files=self.model_files
        )

    def delta(self, name: str, tensors: dict[str, RawTensor], parent: str, **fields) -> Manifest:
        self.published[name] = tensors
        return write_delta(
            self.store,
            self.make_key(name),
            tensors,
            self.info(**fields),
            parent=self.store.manifest(self.make_key(parent)),
            parent_tensors=self.published[parent],
        )

    def lora(
        self,
        name: str,
        tensors: dict[str, RawTensor],
        *,
        family: CheckpointFamily = CheckpointFamily.SAMPLER,
        **fields,
    ) -> Manifest:
        self.published[name] = tensors
        return write_lora(
            self.store,
            self.make_key(name, family),
            tensors,
            self.info(**fields),
            adapter_config={"peft_type": "LORA", "r": 8},
            lora=LoraManifest(rank=8, alpha=32.0),
        )

    def state(self, name: str, tensors: dict[str, RawTensor], **options) -> Manifest:
        files = {"weights.safetensors": tensors, "optimizer.safetensors": tensors}
        key = self.make_key(name, CheckpointFamily.STATE)
        extra = {"optimizer.json": b'{"step": 3}'}
        return write_state(self.store, key, files, self.info(), extra=extra, **options)


@pytest.fixture
def trainer(store, model_files, make_key, clock) -> Trainer:
    return Trainer(store, model_files, make_key, clock)


@pytest.fixture
def same() -> Callable[[Tensors, Tensors], bool]:
    """Whether two sets of tensors agree in names, dtypes, shapes and every bit."""

    def plain(tensors: Tensors) -> dict[str, tuple]:
        return {name: (t.dtype, t.shape, t.data.tobytes()) for name, t in tensors.items()}

    return lambda left, right: plain(left) == plain(right)
