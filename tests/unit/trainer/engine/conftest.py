"""Engines with their model open, and short ways to ask them things."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from homefire.checkpoints import ensure_tiny
from homefire.foundation.clock import Clock, ManualClock
from homefire.trainer.engine.engine import SlotEngine
from homefire.trainer.engine.fake import open_network
from homefire.wire.engine import (
    AdamParams,
    Arrays,
    Digest,
    ExecutionPlan,
    Forward,
    ForwardBackward,
    LoraSpec,
    OpenModel,
    OpenSlot,
    OptimStep,
    Rows,
    SamplerSaved,
    SaveSampler,
    SlotKind,
    Stepped,
    WeightsDigest,
)


class Trainer:
    """An engine with a slot `policy`, on a store in `root`."""

    def __init__(
        self,
        root: Path,
        model_dir: Path,
        build: Callable[[], SlotEngine],
        job: str,
        **more: Any,
    ) -> None:
        self.root = root
        self.engine = build()
        self.opened = self.engine.open_model(
            OpenModel(
                model_dir=str(model_dir),
                base_model="tiny",
                store_root=str(root / "store"),
                account="local",
                job=job,
                threads=1,
                max_context_length=64,
                **more,
            )
        )

    def open(self, kind: SlotKind = SlotKind.FULL, slot: str = "policy", rank: int = 4) -> Trainer:
        lora = LoraSpec(rank=rank) if kind is SlotKind.LORA else None
        self.engine.open_slot(OpenSlot(slot=slot, kind=kind, lora=lora))
        return self

    def backward(
        self,
        arrays: Arrays,
        loss_fn: str = "cross_entropy",
        slot: str = "policy",
        plan: ExecutionPlan | None = None,
    ) -> tuple[Rows, Arrays]:
        request = ForwardBackward(
            slot=slot, loss_fn=loss_fn, loss_fn_config={}, plan=plan or plan_of(arrays)
        )
        return self.engine.forward_backward(request, arrays)

    def forward(
        self, arrays: Arrays, slot: str = "policy", plan: ExecutionPlan | None = None
    ) -> tuple[Rows, Arrays]:
        request = Forward(
            slot=slot, loss_fn="cross_entropy", loss_fn_config={}, plan=plan or plan_of(arrays)
        )
        return self.engine.forward(request, arrays)

    def step(self, **adam: float) -> Stepped:
        params = AdamParams(**{"learning_rate": 1e-2, **adam})
        return self.engine.optim_step(OptimStep(slot="policy", adam=params))

    def train(self, seed: int, num_steps: int = 1) -> Trainer:
        for offset in range(num_steps):
            self.backward(random_batch(seed + offset))
            self.step()
        return self

    def save(self, identity: str, checkpoint_type: str = "delta") -> SamplerSaved:
        return self.engine.prepare_save(
            SaveSampler(slot="policy", identity=identity, checkpoint_type=checkpoint_type)
        ).write()

    def digest(self) -> str:
        reply: Digest = self.engine.weights_digest(WeightsDigest("policy"))
        return reply.digest


def random_batch(
    seed: int = 0, lengths: Sequence[int] = (5, 9, 3), vocab_size: int = 300
) -> Arrays:
    """A cross-entropy batch, every weight 1."""
    generator = np.random.default_rng(seed)
    total = sum(lengths)
    return {
        "tokens": generator.integers(0, vocab_size, total).astype(np.int32),
        "lengths": np.array(lengths, np.int32),
        "target_tokens": generator.integers(0, vocab_size, (total, 1)),
        "weights": np.ones((total, 1), np.float32),
    }


def plan_of(arrays: Arrays) -> ExecutionPlan:
    """The first row alone, the others together."""
    rows = list(range(len(arrays["lengths"])))
    return ExecutionPlan(micro_batches=[rows[:1], rows[1:]], threads=1)


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def make_trainer(tmp_path: Path, tiny_directory: Path) -> Callable[..., Trainer]:
    """A fresh fake engine on this test's store; several share it."""

    def make(job: str = "job-1", clock: Clock | None = None) -> Trainer:
        def engine() -> SlotEngine:
            return SlotEngine(open_network, clock=clock or ManualClock())

        return Trainer(tmp_path, tiny_directory, engine, job)

    return make


@pytest.fixture
def make_trainer_of(tmp_path: Path, tiny_directory: Path) -> Callable[..., Trainer]:
    """The same over an engine of the caller's."""

    def make(build: Callable[[], SlotEngine], job: str) -> Trainer:
        return Trainer(tmp_path, tiny_directory, build, job)

    return make


@pytest.fixture
def make_batch() -> Callable[..., Arrays]:
    """A cross-entropy batch by seed, lengths and vocabulary size."""
    return random_batch
