"""What only a GPU can show. `make test-gpu`, on a machine with one; everywhere else these are left out.

Float32 on CUDA is held to the tolerances of summation order, which shows that the code is right there.
bfloat16, which is what runs, is held to what its 8 bits give on models of unit gain.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from homefire.foundation.clock import ManualClock
from homefire.inference.engine.embedded import EmbeddedNetwork
from homefire.inference.engine.protocol import SequenceRequest, WeightSet
from homefire.inference.engine.scheduler import Scheduler, SchedulerLimits
from homefire.model import varlen
from homefire.model.attention import PackedRows
from homefire.model.attention_rule import AttentionRule, Reach
from homefire.model.device import Numbers, compute_deterministically
from homefire.model.loading import LoadedModel, load_model
from homefire.model.packed import packed_hidden, packed_logprobs
from homefire.model.tensors import raw
from homefire.model.varlen import VarlenRows
from homefire.trainer.engine.adamw import AdamW
from homefire.trainer.engine.pass_budget import SMALLEST_PASS
from homefire.trainer.engine.torch_engine import torch_engine
from homefire.wire.engine import (
    AdamParams,
    Digest,
    ExecutionPlan,
    Forward,
    ForwardBackward,
    LoraSpec,
    OpenModel,
    OpenSlot,
    OptimStep,
    SlotKind,
    WeightsDigest,
)
from homefire.wire.errors import OutOfMemory
from homefire.wire.manifest import CheckpointKind, LoraManifest
from homefire.wire.specs import Accelerator
from parity.families import made
from parity.family_measures import texts
from parity.sampler_models import logprobs_of, prompt
from unit.inference.scheduler_bench import Bench, tokens_of

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
FLOAT32, FLOAT32_GRADIENT = 1e-4, 1e-3
"""Nats, and of the gradient's norm: summation order."""
TYPICAL, WORST, GRADIENT = 0.05, 0.5, 0.05
"""Nats of the median and the worst token, and of the gradient's norm, in bfloat16."""
SAME_NUMBERS = 0.02
"""Nats of the median token between trainer and sampler in bfloat16: the same weights and kernels, in
batches of other shapes."""
FAMILIES = ("llama3_rope", "mistral", "gemma2", "qwen3_tied", "phi", "granite", "llama4")
"""Dense, or with one expert a token: elsewhere the choice of an expert flips in bfloat16."""


@pytest.fixture(scope="module", autouse=True)
def device() -> None:
    assert torch.cuda.is_available(), "these tests need a GPU and torch for CUDA"
    compute_deterministically(CUDA)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return lambda name: made(name, tmp_path_factory.getbasetemp())


def measured(model: LoadedModel) -> tuple[Tensor, Tensor]:
    """Logprobs of packed rows, and the gradient of a weighted sum of them as one vector."""
    rows = texts()
    tokens, lengths = torch.cat(rows).to(model.device), [len(row) for row in rows]
    hidden = packed_hidden(model, tokens, lengths)
    logprobs = packed_logprobs(model, hidden, tokens.roll(-1))
    weights = torch.randn(len(tokens), generator=torch.Generator().manual_seed(4))
    (logprobs * weights.to(model.device)).sum().backward()
    parts = [
        p.grad.float().cpu().flatten() for p in model.module.parameters() if p.grad is not None
    ]
    return logprobs.detach().cpu(), torch.cat(parts)


def off_by(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("family", [*FAMILIES, "gpt_oss", "qwen3_moe", "deepseek_v3"])
def test_float32_on_the_device_is_the_cpus_but_for_the_order_of_sums(directory, family) -> None:
    path = directory(family)
    ours = measured(load_model(path, device=CUDA, numbers=Numbers.FLOAT32))
    theirs = measured(load_model(path))
    assert (ours[0] - theirs[0]).abs().max() < FLOAT32
    assert off_by(ours[1], theirs[1]) < FLOAT32_GRADIENT


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_near_the_cpus_float32(directory, family) -> None:
    path = directory(family)
    ours, theirs = measured(load_model(path, device=CUDA)), measured(load_model(path))
    apart = (ours[0] - theirs[0]).abs()
    assert apart.median() < TYPICAL
    assert apart.max() < WORST
    assert off_by(ours[1], theirs[1]) < GRADIENT


# The kernel -----------------------------------------------------------------------------------

ROWS = [5, 1, 700, 700, 130]
RULES = {
    "plain": AttentionRule(),
    "window": AttentionRule(Reach(window=64)),
    "window of one": AttentionRule(Reach(window=1)),
    "scaling": AttentionRule(scaling=0.05),
}


def attended(rows: Any, rule: AttentionRule, dtype: torch.dtype, groups: int) -> list[Tensor]:
    """The output and the gradients of queries, keys and values, in float32."""
    generator = torch.Generator().manual_seed(1)

    def leaf(heads: int) -> Tensor:
        values = torch.randn(1, heads, sum(ROWS), 64, generator=generator)
        return values.to(CUDA, dtype).requires_grad_(True)

    leaves = [leaf(8), leaf(groups), leaf(groups)]
    output = rows(*leaves, rule)
    output.backward(torch.ones_like(output) * torch.linspace(-1, 1, 64, device=CUDA).to(dtype))
    return [output.detach().float(), *(tensor.grad.float() for tensor in leaves)]


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("groups", [8, 2])
def test_the_variable_length_kernel_is_attention_row_by_row(rule, groups) -> None:
    kernel = VarlenRows(ROWS, CUDA).attend
    found = attended(kernel, rule, torch.bfloat16, groups)
    packed = PackedRows(ROWS)
    exact = attended(lambda *a: packed.attend(None, *a), rule, torch.float32, groups)
    for ours, theirs in zip(found, exact, strict=True):
        assert off_by(ours, theirs) < 0.02
    if rule.reach.window == 64:
        wider = replace(rule, reach=Reach(window=65))
        wrong = attended(kernel, wider, torch.bfloat16, groups)
        assert off_by(wrong[0], exact[0]) > 2 * off_by(found[0], exact[0])


def test_layers_whose_terms_the_kernel_has_take_it_and_others_do_not(
    directory, monkeypatch
) -> None:
    taken: list[AttentionRule] = []
    attend = VarlenRows.attend

    def noted(self: VarlenRows, query: Any, key: Any, value: Any, rule: AttentionRule) -> Tensor:
        taken.append(rule)
        return attend(self, query, key, value, rule)

    monkeypatch.setattr(varlen.VarlenRows, "attend", noted)
    measured(load_model(directory("mistral"), device=CUDA))
    assert taken
    taken.clear()
    measured(load_model(directory("gemma2"), device=CUDA))
    assert not taken


# Training -------------------------------------------------------------------------------------


class Trainer:
    def __init__(self, path: Path, store: Path, kind: SlotKind, recompute: int = 0) -> None:
        self.engine = torch_engine()
        self.recompute = recompute
        self.opened = self.engine.open_model(
            OpenModel(
                model_dir=str(path),
                base_model="tiny",
                store_root=str(store),
                account="local",
                job="job-1",
                threads=1,
                max_context_length=100_000,
                accelerator=Accelerator.CUDA,
            )
        )
        lora = LoraSpec(rank=4, alpha=8.0, seed=1) if kind is SlotKind.LORA else None
        self.engine.open_slot(OpenSlot(slot="policy", kind=kind, lora=lora))

    def asked(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        rows = list(range(len(batch["lengths"])))
        cut = [rows[:1], rows[1:]] if len(rows) > 1 else [rows]
        plan = ExecutionPlan(micro_batches=cut, threads=1, recompute=[self.recompute] * len(cut))
        return {"slot": "policy", "loss_fn": "cross_entropy", "loss_fn_config": {}, "plan": plan}

    def backward(self, batch: dict[str, np.ndarray]) -> np.ndarray:
        return self.engine.forward_backward(ForwardBackward(**self.asked(batch)), batch)[1][
            "logprobs"
        ]

    def forward(self, batch: dict[str, np.ndarray]) -> np.ndarray:
        return self.engine.forward(Forward(**self.asked(batch)), batch)[1]["logprobs"][:, 0]

    def step(self) -> None:
        self.engine.optim_step(OptimStep(slot="policy", adam=AdamParams(learning_rate=1e-3)))

    def digest(self) -> str:
        reply: Digest = self.engine.weights_digest(WeightsDigest("policy"))
        return reply.digest


def batch_of(lengths: list[int], seed: int = 0) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    total = sum(lengths)
    return {
        "tokens": generator.integers(0, 97, total).astype(np.int32),
        "lengths": np.array(lengths, np.int32),
        "target_tokens": generator.integers(0, 97, (total, 1)),
    }


@pytest.mark.parametrize("kind", [SlotKind.FULL, SlotKind.LORA])
def test_the_same_requests_give_the_same_bits_recomputed_or_not(directory, tmp_path, kind) -> None:
    digests = set()
    for recompute in (0, 0, 4):
        trainer = Trainer(directory("mistral"), tmp_path, kind, recompute)
        for seed in range(3):
            trainer.backward(batch_of([40, 17, 90], seed))
            trainer.step()
        digests.add(trainer.digest())
    assert len(digests) == 1


def test_a_pass_is_cut_by_what_the_device_has_free(directory, tmp_path) -> None:
    found = Trainer(directory("mistral"), tmp_path, SlotKind.FULL).opened.pass_budget
    assert found is not None
    assert found.micro_batch_tokens > SMALLEST_PASS
    assert found.activations.max_bytes < torch.cuda.mem_get_info(CUDA)[0]


def test_a_batch_that_does_not_fit_fails_alone_and_the_next_is_exact(directory, tmp_path) -> None:
    trainer, undisturbed = (
        Trainer(directory("mistral"), tmp_path / name, SlotKind.FULL) for name in "ab"
    )
    for each in (trainer, undisturbed):
        each.backward(batch_of([30, 20], 1))
    total = torch.cuda.get_device_properties(CUDA).total_memory
    allowed = torch.cuda.memory_allocated(CUDA) + (256 << 20)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(allowed / total, CUDA)
    try:
        with pytest.raises(OutOfMemory, match="nothing was accumulated"):
            trainer.backward(batch_of([200] * 4000, 2))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, CUDA)
    for each in (trainer, undisturbed):
        each.backward(batch_of([30, 20], 3))
        each.step()
    assert trainer.digest() == undisturbed.digest()


def test_adamw_on_the_device_is_the_cpus_to_the_last_places() -> None:
    generator = torch.Generator().manual_seed(0)
    start, *gradients = (torch.randn(1000, generator=generator) for _ in range(6))
    ends: list[Tensor] = []
    for where in ("cpu", "cuda", "cuda"):
        masters = {"w": start.to(where, copy=True)}
        adam = AdamW(masters)
        for gradient in gradients:
            params = AdamParams(learning_rate=1e-2, weight_decay=0.1)
            adam.step(masters, {"w": gradient.to(where)}, params, scale=0.5)
        ends.append(masters["w"].cpu())
    assert torch.equal(ends[1], ends[2])
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-6, atol=1e-7)


# Trainer and sampler --------------------------------------------------------------------------


def sampler_of(path: Path) -> Bench:
    network = EmbeddedNetwork(
        path, max_running=8, max_context_length=256, threads=1, accelerator=Accelerator.CUDA
    )
    clock = ManualClock()
    limits = SchedulerLimits(delivery_interval_s=0.0)
    scheduler = Scheduler(network, network.resident_weights(), limits=limits, clock=clock)
    return Bench(scheduler, clock)


@pytest.mark.parametrize("kind", [SlotKind.FULL, SlotKind.LORA])
def test_the_sampler_says_the_logprobs_that_the_trainer_has(directory, tmp_path, kind) -> None:
    path = directory("qwen3_tied")
    trainer, sampler = Trainer(path, tmp_path, kind), sampler_of(path)
    for seed in range(3):
        trainer.backward(batch_of([40, 17], seed))
        trainer.step()
    serving = trainer.engine._slots.get("policy").weights.serving()
    served = replace(sampler.scheduler.serving.served, digest=trainer.digest())
    is_lora = kind is SlotKind.LORA
    weights = WeightSet(
        served,
        CheckpointKind.LORA if is_lora else CheckpointKind.BASE,
        serving,
        LoraManifest(4, 8.0) if is_lora else None,
    )
    assert sampler.scheduler._network.install(weights) == trainer.digest()
    prompts = [prompt(length, length) for length in (5, 17, 30)]
    recorders = [
        sampler.submit(SequenceRequest(text, 24, seed=i))[1] for i, text in enumerate(prompts)
    ]
    sampler.run()
    for text, recorder in zip(prompts, recorders, strict=True):
        whole = [*text, *tokens_of(recorder)]
        batch = {
            "tokens": np.array(whole[:-1], np.int32),
            "lengths": np.array([len(whole) - 1], np.int32),
            "target_tokens": np.array(whole[1:], np.int64)[:, None],
        }
        ours = trainer.forward(batch)[len(text) - 1 :]
        apart = np.abs(ours - np.array(logprobs_of(recorder)))
        assert np.median(apart) < SAME_NUMBERS
        assert apart.max() < WORST


def test_a_tensor_of_the_device_comes_back_with_its_bits() -> None:
    values = torch.randn(7, 3).bfloat16()
    assert np.array_equal(raw(values.to(CUDA)).data, raw(values).data)
