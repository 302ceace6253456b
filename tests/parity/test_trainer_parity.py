"""The torch trainer's numbers against plain Hugging Face, and against itself run again."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from homefire.checkpoints import ensure_tiny
from homefire.trainer.engine.batch import micro_batches, read_batch
from homefire.trainer.engine.torch_engine import torch_engine
from homefire.wire.engine import (
    AdamParams,
    ExecutionPlan,
    ForwardBackward,
    LoraSpec,
    OpenModel,
    OpenSlot,
    OptimStep,
    SlotKind,
    WeightsDigest,
)

transformers_logging.disable_progress_bar()
LENGTHS = (12, 40, 3, 40, 25)
PLAN = ExecutionPlan(micro_batches=[[1, 3], [0, 2, 4]], threads=1)


@pytest.fixture(scope="module")
def tiny_directory(tmp_path_factory):
    return ensure_tiny(tmp_path_factory.mktemp("models") / "tiny")


def open_engine(model_dir: Path, store: Path, kind: SlotKind = SlotKind.FULL):
    engine = torch_engine()
    engine.open_model(
        OpenModel(
            model_dir=str(model_dir),
            base_model="tiny",
            store_root=str(store),
            account="local",
            job="job-1",
            threads=1,
            max_context_length=64,
        )
    )
    lora = LoraSpec(rank=4, seed=1) if kind is SlotKind.LORA else None
    engine.open_slot(OpenSlot(slot="policy", kind=kind, lora=lora))
    return engine


def batch_of(seed: int, num_targets: int = 1):
    generator = np.random.default_rng(seed)
    total = sum(LENGTHS)
    return {
        "tokens": generator.integers(0, 320, total).astype(np.int32),
        "lengths": np.array(LENGTHS, np.int32),
        "target_tokens": generator.integers(0, 320, (total, num_targets)),
        "weights": generator.standard_normal((total, num_targets)).astype(np.float32),
    }


def backward(engine, batch):
    request = ForwardBackward(slot="policy", loss_fn="cross_entropy", loss_fn_config={}, plan=PLAN)
    return engine.forward_backward(request, batch)[1]["logprobs"]


def train(engine, num_steps: int) -> str:
    for step in range(num_steps):
        backward(engine, batch_of(step))
        engine.optim_step(OptimStep(slot="policy", adam=AdamParams(learning_rate=1e-3)))
    return engine.weights_digest(WeightsDigest("policy")).digest


def hugging_face(directory: Path):
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
    )


def row_by_row(module, batch):
    """Logprobs [T, K] of each row alone, differentiable."""
    rows = zip(
        torch.from_numpy(batch["tokens"].astype(np.int64)).split(LENGTHS),
        torch.from_numpy(batch["target_tokens"]).split(LENGTHS),
        strict=True,
    )
    logprobs = [
        module(input_ids=tokens[None], use_cache=False)
        .logits[0]
        .log_softmax(-1)
        .gather(-1, targets)
        for tokens, targets in rows
    ]
    return torch.cat(logprobs)


@pytest.mark.parametrize("num_targets", [1, 3])
def test_packed_logprobs_equal_hugging_face_row_by_row(tiny_directory, tmp_path, num_targets):
    engine = open_engine(tiny_directory, tmp_path)
    batch = batch_of(0, num_targets)
    theirs = row_by_row(hugging_face(tiny_directory), batch).detach().numpy()
    np.testing.assert_allclose(backward(engine, batch), theirs, atol=1e-5, rtol=0)


def test_rows_that_saw_one_another_would_differ(tiny_directory, tmp_path):
    """The planted mistake: the same tokens as one row."""
    engine = open_engine(tiny_directory, tmp_path)
    batch = {name: array[:52] for name, array in batch_of(0).items()}
    theirs = row_by_row(hugging_face(tiny_directory), batch_of(0)).detach().numpy()[:52]
    request = ForwardBackward(
        slot="policy",
        loss_fn="cross_entropy",
        loss_fn_config={},
        plan=ExecutionPlan(micro_batches=[[0]], threads=1),
    )
    joined = engine.forward_backward(request, {**batch, "lengths": np.array([52], np.int32)})
    assert np.abs(joined[1]["logprobs"] - theirs).max() > 1e-3


def test_accumulated_gradients_equal_autograd_through_hugging_face(tiny_directory, tmp_path):
    engine = open_engine(tiny_directory, tmp_path)
    module = hugging_face(tiny_directory)
    for seed in (0, 1):
        batch = batch_of(seed)
        backward(engine, batch)
        loss = -(row_by_row(module, batch) * torch.from_numpy(batch["weights"])).sum()
        loss.backward()
    theirs = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    ours = engine._slots.get("policy").trainable()._gradient
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(ours[name], gradient, atol=2e-5 * scale, rtol=0, msg=name)


OTHER_PLAN = ExecutionPlan(micro_batches=[[0, 1], [2], [3, 4]], threads=1)
_IN_ANOTHER_PROCESS = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_trainer_parity as parity
directory, store = Path(sys.argv[2]), Path(sys.argv[3])
print(json.dumps(parity.bits_of_runs(directory, store)))
"""


def bits_of_runs(directory: Path, store: Path) -> dict[str, str]:
    """By kind of slot and plan, a digest of every bit that three steps computed."""
    runs = {}
    for kind in (SlotKind.FULL, SlotKind.LORA):
        for plan in (PLAN, OTHER_PLAN):
            name = f"{kind.value}, {len(plan.micro_batches)} micro-batches"
            runs[name] = bits_of_run(open_engine(directory, store / name, kind), plan)
    return runs


def bits_of_run(engine, plan: ExecutionPlan) -> str:
    digest = hashlib.sha256()
    for step in range(3):
        request = ForwardBackward(
            slot="policy", loss_fn="cross_entropy", loss_fn_config={}, plan=plan
        )
        rows, arrays = engine.forward_backward(request, batch_of(step))
        stepped = engine.optim_step(OptimStep(slot="policy", adam=AdamParams(learning_rate=1e-3)))
        digest.update(arrays["logprobs"].tobytes())
        digest.update(repr([rows.metrics, stepped.metrics]).encode())
    files = engine._slots.get("policy").trainable().files()
    for tensors in (files.masters, files.optimizer):
        for name in sorted(tensors):
            digest.update(name.encode() + tensors[name].data.tobytes())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def two_processes(tiny_directory, tmp_path_factory) -> list[dict[str, str]]:
    """What two fresh processes computed, started with different hash seeds."""
    running = []
    for seed in ("1", "2"):
        store = tmp_path_factory.mktemp("store")
        arguments = [str(Path(__file__).parent), str(tiny_directory), str(store)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", _IN_ANOTHER_PROCESS, *arguments]
        running.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        )
    outputs = [process.communicate(timeout=200)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    return [json.loads(output) for output in outputs]


def test_the_same_requests_and_plans_give_the_same_bits_in_every_process(two_processes):
    """Logprobs, metrics, masters and moments; full parameter and LoRA."""
    first, second = two_processes
    assert first == second
    assert len(first) == 4


def test_another_plan_gives_other_bits(two_processes):
    """Which is why the plan is journaled: the digest above would show a plan that is not obeyed."""
    assert len(set(two_processes[0].values())) == 4


def test_compute_weights_are_the_rounding_of_the_masters(tiny_directory, tmp_path):
    engine = open_engine(tiny_directory, tmp_path)
    train(engine, 2)
    weights = engine._slots.get("policy").trainable()
    rounded = 0
    for name, master in weights._masters.items():
        computed = weights._leaves[name].detach()
        assert torch.equal(computed, master.bfloat16().float()), name
        rounded += int(torch.count_nonzero(computed != master))
    assert rounded > 0.9 * weights.num_trainable


@pytest.mark.parametrize("kind", [SlotKind.FULL, SlotKind.LORA])
def test_a_fused_loss_gives_the_bits_of_a_loss_that_comes_later(tiny_directory, tmp_path, kind):
    """What a custom loss pushes must not depend on how it is computed; some tokens are masked."""
    engine = open_engine(tiny_directory, tmp_path, kind)
    train(engine, 2)  # an adapter's B is no longer zero
    batch = batch_of(0)
    batch["weights"][::3] = 0
    logprobs = backward(engine, batch)
    weights = engine._slots.get("policy").trainable()
    fused = {name: tensor.clone() for name, tensor in weights._gradient.items()}
    weights.clear_gradient()
    for cut in micro_batches(read_batch(batch, vocab_size=320, max_context_length=64), PLAN):
        again = weights.backward(
            cut.batch.packed(), lambda _, cut=cut: -cut.batch.inputs["weights"]
        )
        np.testing.assert_array_equal(again, logprobs[cut.places])
    weights.keep_gradient()
    assert fused.keys() == weights._gradient.keys()
    for name, gradient in weights._gradient.items():
        assert torch.equal(gradient, fused[name]), name
