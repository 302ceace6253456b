"""Model FLOPs of training on one GPU, beside what the same GPU gives a bare matrix product.

    make bench-trainer ARGS=--gpu

Qwen3 shapes with random weights, full parameter and LoRA, rows of 8 k and 16 k tokens, through the engine
that jobs run: its own micro-batches and recomputation, from its own budget. What recomputation runs twice
is not counted twice. A model that does not fit is said to, and left out.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from batches import make_batch
from models import Model, make_qwen3
from report import Bar, Report, Row

from homefire.trainer.engine.torch_engine import torch_engine
from homefire.trainer.front.plan import execution_plan
from homefire.wire.engine import (
    AdamParams,
    DiscardGradients,
    ForwardBackward,
    LoraSpec,
    ModelOpened,
    OpenModel,
    OpenSlot,
    OptimStep,
    SlotKind,
)
from homefire.wire.errors import HomefireError
from homefire.wire.specs import Accelerator

QWEN3 = {
    "qwen3-0.6b": {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
    },
    "qwen3-4b": {
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
    },
    "qwen3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
    },
}
_SAME = {
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
}
CONTEXTS = {"4x8k": [8192] * 4, "2x16k": [16384] * 2}
RANK = 32
FULL_4B_BAR = 0.45
_ROUNDS = 3
_MATRIX = 8192


@dataclass(frozen=True)
class Shape:
    """What the FLOPs of a pass depend on."""

    num_parameters: int
    """Those that are multiplied with: a tied embedding counts once, as the head."""
    num_layers: int
    attention_width: int
    """Query heads x head width."""


def pass_flops(shape: Shape, lengths: list[int], *, is_full: bool) -> float:
    """Forward and backward. A weight costs 2 a token forward, 2 for the inputs' gradient, and 2 for its own
    where it is trained; attention 4 a width, layer and pair of tokens forward and 8 backward, of which
    causal attention needs half."""
    per_weight = 6 if is_full else 4
    pairs = sum(length * length for length in lengths) / 2
    attention = 12 * shape.num_layers * shape.attention_width * pairs
    return per_weight * shape.num_parameters * sum(lengths) + attention


def measure(report: Report, root: Path) -> None:
    for name, sizes in QWEN3.items():
        model = make_qwen3(root / name, **sizes, **_SAME)
        for kind in (SlotKind.FULL, SlotKind.LORA):
            try:
                _measure_kind(report, model, root, kind)
            except (HomefireError, torch.OutOfMemoryError) as error:
                print(f"  {name} {kind}: left out: {error}", flush=True)
            gc.collect()
            torch.cuda.empty_cache()


def _measure_kind(report: Report, model: Model, root: Path, kind: SlotKind) -> None:
    engine = torch_engine()
    opened = engine.open_model(
        OpenModel(
            model_dir=str(model.directory),
            base_model=model.name,
            store_root=str(root / "store"),
            account="local",
            job="bench",
            threads=1,
            max_context_length=40960,
            accelerator=Accelerator.CUDA,
            held_graph_bytes=0,
        )
    )
    lora = LoraSpec(rank=RANK, seed=0, train_unembed=False) if kind is SlotKind.LORA else None
    engine.open_slot(OpenSlot(slot="policy", kind=kind, lora=lora))
    shape = shape_of(model)
    for context, lengths in CONTEXTS.items():
        batch = make_batch(lengths, model.vocab_size)
        request = _request(lengths, opened)

        def run(request: ForwardBackward = request, batch: dict = batch) -> None:
            engine.forward_backward(request, batch)
            engine.discard_gradients(DiscardGradients("policy"))

        torch.cuda.reset_peak_memory_stats()
        seconds, rate = _alternating(run)
        flops = pass_flops(shape, lengths, is_full=kind is SlotKind.FULL)
        share = flops / seconds / rate
        what = "full parameter" if kind is SlotKind.FULL else f"LoRA r{RANK}"
        report.add(Row(model.name, context, what, seconds, sum(lengths), gemm_share=share))
        prefix = f"{model.name}_{context}_{kind}"
        report.note(
            **{
                f"{prefix}_model_tflops": flops / seconds / 1e12,
                f"{prefix}_matrix_tflops": rate / 1e12,
                f"{prefix}_recomputed_layers": float(max(request.plan.recompute, default=0)),
                f"{prefix}_peak_gib": torch.cuda.max_memory_allocated() / (1 << 30),
            }
        )
        if (model.name, context, kind) == ("qwen3-4b", "2x16k", SlotKind.FULL):
            report.add(Bar("4B full parameter, 16k, of the matrix rate", share, FULL_4B_BAR))
    step = OptimStep(slot="policy", adam=AdamParams(learning_rate=1e-6))
    report.add(Row(model.name, "step", kind.value, _timed(lambda: engine.optim_step(step))))


def shape_of(model: Model) -> Shape:
    config = json.loads((model.directory / "config.json").read_text())
    return Shape(
        model.num_parameters,
        config["num_hidden_layers"],
        config["num_attention_heads"] * config["head_dim"],
    )


def _request(lengths: list[int], opened: ModelOpened) -> ForwardBackward:
    """As the front cuts it for this device."""
    budget = opened.pass_budget
    assert budget is not None
    plan = execution_plan(
        lengths,
        token_budget=budget.micro_batch_tokens,
        threads=1,
        activations=budget.activations,
    )
    return ForwardBackward(slot="policy", loss_fn="cross_entropy", loss_fn_config={}, plan=plan)


def _alternating(run: Callable[[], None]) -> tuple[float, float]:
    """Median seconds of a pass, and FLOP per second of a bfloat16 product between the passes."""
    run()
    seconds, rates = [], []
    for _ in range(_ROUNDS):
        rates.append(_matrix_rate())
        seconds.append(_timed(run))
    return statistics.median(seconds), statistics.median(rates)


def _matrix_rate() -> float:
    left, right = (
        torch.ones(_MATRIX, _MATRIX, dtype=torch.bfloat16, device="cuda") for _ in range(2)
    )
    times = [_timed(lambda: torch.mm(left, right)) for _ in range(8)]
    return 2 * _MATRIX**3 / statistics.median(times)


def _timed(run: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - started
