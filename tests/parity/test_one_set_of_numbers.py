"""Trainer and sampler compute with the same weights: over 20 optimizer steps with a hot load each, what
the sampler draws has, in the trainer, the logprob that the sampler said, to summation order.

Both real engines, with the store between them: bases, deltas and adapters as they are written and
read. The models have weights of unit gain, so that a stale or unrounded weight shows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from homefire.checkpoints import DirectoryStore
from homefire.inference.engine.protocol import PromptScoring, SequenceRequest
from homefire.inference.replica.hot_load import read_weights
from homefire.trainer.engine.torch_engine import torch_engine
from homefire.wire.engine import (
    AdamParams,
    ExecutionPlan,
    Forward,
    ForwardBackward,
    LoraSpec,
    OpenModel,
    OpenSlot,
    OptimStep,
    SaveSampler,
    SlotKind,
)
from homefire.wire.internal import SnapshotLocation
from parity.sampler_models import logprobs_of, open_bench, prompt, small_qwen3, swap
from unit.inference.scheduler_bench import tokens_of

STEPS = 20
NEW_TOKENS = 24
PROMPTS = [prompt(length, length) for length in (5, 17, 9, 30)]
TOLERANCE = 1e-5
"""Nats on a logprob, and on a ratio. Both sum in float32, in different orders; measured 3e-6."""
ADAM = AdamParams(learning_rate=3e-3, weight_decay=0.01)
PLAN = ExecutionPlan(micro_batches=[[3, 1], [0, 2]], threads=1)
WHERE = SnapshotLocation("local", "job-1", "policy")


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def model_directory(tmp_path_factory: pytest.TempPathFactory, request: Any) -> Path:
    return small_qwen3(tmp_path_factory.getbasetemp(), tied=request.param, seed=1)


class OnPolicyLoop:
    """Draws with the sampler, trains on what was drawn, saves, loads."""

    def __init__(self, directory: Path, root: Path, kind: SlotKind) -> None:
        self.trainer = torch_engine()
        self.trainer.open_model(
            OpenModel(
                model_dir=str(directory),
                base_model="small",
                store_root=str(root),
                account=WHERE.account,
                job=WHERE.job,
                threads=1,
                max_context_length=256,
            )
        )
        lora = LoraSpec(rank=4, alpha=8.0, seed=1) if kind is SlotKind.LORA else None
        self.trainer.open_slot(OpenSlot(slot=WHERE.slot, kind=kind, lora=lora))
        self.sampler = open_bench(directory)
        self.store = DirectoryStore(root)
        self.saved: list[Any] = []

    def draw(self, seed: int) -> list[tuple[list[int], list[float]]]:
        """Tokens and logprobs of one continuation of each prompt, in one continuous batch."""
        recorders = [
            self.sampler.submit(SequenceRequest(each, NEW_TOKENS, seed=seed + i))[1]
            for i, each in enumerate(PROMPTS)
        ]
        self.sampler.run()
        return [(tokens_of(each), logprobs_of(each)) for each in recorders]

    def scored(self, texts: list[list[int]]) -> np.ndarray:
        """The sampler's logprobs of whole texts, their first tokens left out."""
        requests = [SequenceRequest(tuple(t), 0, scoring=PromptScoring(1)) for t in texts]
        recorders = [self.sampler.submit(each)[1] for each in requests]
        self.sampler.run()
        found = [
            update.logprobs for each in recorders for update in each.updates if _scored(update)
        ]
        return np.concatenate(found)

    def forward(self, arrays: dict[str, np.ndarray]) -> np.ndarray:
        """The trainer's logprobs of every target, packed, in micro-batches of several rows."""
        asked = Forward(slot=WHERE.slot, loss_fn="cross_entropy", loss_fn_config={}, plan=PLAN)
        return self.trainer.forward(asked, arrays)[1]["logprobs"][:, 0]

    def train(self, arrays: dict[str, np.ndarray]) -> dict[str, float]:
        asked = ForwardBackward(
            slot=WHERE.slot, loss_fn="importance_sampling", loss_fn_config={}, plan=PLAN
        )
        rows, _ = self.trainer.forward_backward(asked, arrays)
        self.trainer.optim_step(OptimStep(slot=WHERE.slot, adam=ADAM))
        return rows.metrics

    def hot_load(self) -> None:
        identity = f"step-{len(self.saved)}"
        self.saved.append(
            self.trainer.prepare_save(
                SaveSampler(slot=WHERE.slot, identity=identity, checkpoint_type="delta")
            ).write()
        )
        weights = read_weights(self.store, WHERE, identity, None)
        assert weights.served.digest == self.saved[-1].digest
        swap(self.sampler, weights)


def _scored(update: Any) -> bool:
    return bool(getattr(update, "logprobs", []))


def batch_of(drawn: list[tuple[list[int], list[float]]]) -> dict[str, np.ndarray]:
    """Rows of prompt and continuation; the sampler's logprobs and advantages on what was drawn."""
    texts = [[*p, *tokens] for p, (tokens, _) in zip(PROMPTS, drawn, strict=True)]
    undrawn = [np.zeros(len(each) - 1) for each in PROMPTS]
    old = [np.concatenate([u, lps]) for u, (_, lps) in zip(undrawn, drawn, strict=True)]
    advantages = [
        np.concatenate([u, np.full(NEW_TOKENS, 1.0 if row % 2 else -1.0)])
        for row, u in enumerate(undrawn)
    ]
    return {
        "tokens": np.concatenate([text[:-1] for text in texts]).astype(np.int32),
        "lengths": np.array([len(text) - 1 for text in texts], np.int32),
        "target_tokens": np.concatenate([text[1:] for text in texts])[:, None].astype(np.int64),
        "logprobs": np.concatenate(old)[:, None].astype(np.float32),
        "advantages": np.concatenate(advantages)[:, None].astype(np.float32),
    }


def texts_of(arrays: dict[str, np.ndarray]) -> list[list[int]]:
    edges = np.cumsum(arrays["lengths"])[:-1]
    rows = zip(
        np.split(arrays["tokens"], edges), np.split(arrays["target_tokens"], edges), strict=True
    )
    return [[*tokens.tolist(), int(targets[-1, 0])] for tokens, targets in rows]


@pytest.mark.parametrize("kind", [SlotKind.FULL, SlotKind.LORA])
def test_trainer_and_sampler_agree_over_twenty_steps_with_a_hot_load_each(
    model_directory, tmp_path, kind
):
    loop = OnPolicyLoop(model_directory, tmp_path, kind)
    worst = {"drawn": 0.0, "scored": 0.0, "ratio": 0.0}
    for step in range(STEPS):
        arrays = batch_of(loop.draw(seed=100 * step))
        drawn = arrays["advantages"][:, 0] != 0
        trainers = loop.forward(arrays)
        by_draw = np.abs(trainers - arrays["logprobs"][:, 0])[drawn].max()
        by_score = np.abs(trainers - loop.scored(texts_of(arrays))).max()
        metrics = loop.train(arrays)
        by_ratio = max(metrics["ratio:max"] - 1, 1 - metrics["ratio:min"])
        loop.hot_load()
        found = {"drawn": by_draw, "scored": by_score, "ratio": by_ratio}
        worst = {name: max(worst[name], float(found[name])) for name in worst}
    assert max(worst.values()) < TOLERANCE
    moved = np.abs(loop.forward(arrays) - trainers).max()
    assert moved > 100 * TOLERANCE, "one step moves what is compared by far more than the tolerance"
    kinds = [saved.kind for saved in loop.saved]
    assert kinds == (
        ["base"] + ["delta"] * (STEPS - 1) if kind is SlotKind.FULL else ["lora"] * STEPS
    )


@pytest.mark.parametrize("kind", [SlotKind.FULL, SlotKind.LORA])
def test_a_sampler_that_is_one_step_behind_would_be_seen(model_directory, tmp_path, kind):
    """The planted fault: the last hot load is left out."""
    loop = OnPolicyLoop(model_directory, tmp_path, kind)
    for step in range(2):
        arrays = batch_of(loop.draw(seed=100 * step))
        loop.train(arrays)
        if step == 0:
            loop.hot_load()
    stale = np.abs(loop.forward(arrays) - loop.scored(texts_of(arrays))).max()
    assert stale > 100 * TOLERANCE
    loop.hot_load()
    fresh = np.abs(loop.forward(arrays) - loop.scored(texts_of(arrays))).max()
    assert fresh < TOLERANCE
