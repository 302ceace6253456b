"""forward_backward and optim_step in process, beside the padded loop, `peft` and torch's optimizers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from batches import SHAPES, make_batch
from models import Model, empty_module
from peers import PaddedLoop
from report import Bar, Report, Row
from timing import Rounds, Run, alternate
from trainer import RANK, InProcess

from homefire.wire.engine import Arrays

FULL = "full parameter, forward_backward"
LORA = f"LoRA r{RANK}, forward_backward"
PADDED = "padded Hugging Face loop"
PEFT = f"peft r{RANK}, padded"
STEP = "optim_step, full: checked, clipped, measured, rounded"
LORA_STEP = f"optim_step, LoRA r{RANK}"
FOREACH = "torch.optim.AdamW(foreach=True), the update alone"
FUSED = "torch.optim.AdamW(fused=True), the update alone"
_RIVAL_SHAPES = ("8x128", "mixed")
"""At 32x256 nothing is padded, and full logits of 8192 tokens only cost memory."""
OfBatch = Callable[[Arrays], object]


def measure(
    report: Report, models: list[Model], root: Path, *, rounds: int, shapes: list[str]
) -> None:
    for model in models:
        full, lora = InProcess(model, root), InProcess(model, root)
        slots = full.open_full(), lora.open_lora()
        padded, peft = PaddedLoop(model), PaddedLoop(model, lora=True)
        _warm_up(model, [_pass(full, slots[0]), _pass(lora, slots[1]), _loop(padded), _loop(peft)])
        for shape in shapes:
            batch = make_batch(SHAPES[shape], model.vocab_size)
            candidates: dict[str, Run] = {
                FULL: partial(_pass(full, slots[0]), batch),
                LORA: partial(_pass(lora, slots[1]), batch),
            }
            if shape in _RIVAL_SHAPES:
                candidates[PADDED] = partial(_loop(padded), batch)
            if shape == "8x128":
                candidates[PEFT] = partial(_loop(peft), batch)
            found = alternate(candidates, rounds=_rounds(shape, model, rounds))
            report.add(*_rows(found, model, shape, sum(SHAPES[shape])))
            if model.name == "small":
                report.add(*_bars(found, shape, 6 * model.num_parameters * sum(SHAPES[shape])))
        _measure_steps(report, model, (full, slots[0]), (lora, slots[1]))


def _rounds(shape: str, model: Model, rounds: int) -> int:
    """The largest batch of the larger model takes as long as all the others: it runs once."""
    if model.name != "small" or shape == "8x128":
        return rounds
    return 1 if shape == "32x256" else min(rounds, 2)


def _warm_up(model: Model, passes: list[OfBatch]) -> None:
    """At the smallest measured size: who runs first would pay for everybody's memory."""
    batch = make_batch(SHAPES["8x128"], model.vocab_size)
    for run in passes:
        run(batch)


def _pass(engine: InProcess, slot: str) -> OfBatch:
    return lambda batch: engine.forward_backward(slot, batch)


def _loop(loop: PaddedLoop) -> OfBatch:
    return loop.forward_backward


def _rows(found: Rounds, model: Model, shape: str, tokens: int) -> list[Row]:
    flops = 6 * model.num_parameters * tokens
    return [
        Row(model.name, shape, what, times.cpu_s, tokens, found.gemm_share(what, flops))
        for what, times in found.times.items()
    ]


def _bars(found: Rounds, shape: str, flops: float) -> list[Bar]:
    seconds = {what: times.cpu_s for what, times in found.times.items()}
    bars: list[Bar] = []
    if shape in _RIVAL_SHAPES:
        share = found.gemm_share(FULL, flops)
        bars.append(
            Bar(
                f"full parameter {shape}, share of the GEMM rate",
                share,
                at_least=0.65,
                limited_by="elementwise kernels and attention, which count no FLOP here",
            )
        )
    if shape == "mixed":
        bars.append(
            Bar("padded loop / full parameter, mixed", seconds[PADDED] / seconds[FULL], 1.7)
        )
    if shape == "8x128":
        bars.append(Bar("peft / LoRA, 8x128", seconds[PEFT] / seconds[LORA], 1.0))
    return bars


def _measure_steps(
    report: Report, model: Model, full: tuple[InProcess, str], lora: tuple[InProcess, str]
) -> None:
    parameters = _parameters(model)
    optimizers = {
        FOREACH: torch.optim.AdamW(parameters, lr=1e-6, foreach=True),
        FUSED: torch.optim.AdamW(parameters, lr=1e-6, fused=True),
    }
    steps: dict[str, Run] = {STEP: _step(full), LORA_STEP: _step(lora)}
    steps |= {name: optimizer.step for name, optimizer in optimizers.items()}
    for name in (FOREACH, FUSED):
        steps[name]()
    found = alternate(
        steps, rounds=5, before={STEP: _accumulate(full), LORA_STEP: _accumulate(lora)}
    )
    report.add(*(Row(model.name, "-", what, t.cpu_s) for what, t in found.times.items()))


def _parameters(model: Model) -> list[torch.nn.Parameter]:
    shapes = [parameter.shape for parameter in empty_module(model).parameters()]
    parameters = [torch.nn.Parameter(torch.randn(shape) / 50) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape)
    return parameters


def _step(of: tuple[InProcess, str]) -> Run:
    engine, slot = of
    return lambda: engine.step(slot)


def _accumulate(of: tuple[InProcess, str]) -> Run:
    engine, slot = of
    return lambda: engine.accumulate(slot)
