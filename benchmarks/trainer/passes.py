"""forward_backward and optim_step in process, beside the padded loop and `peft`."""

from __future__ import annotations

from pathlib import Path

from batches import SHAPES, make_batch
from models import Model
from peers import PaddedLoop
from report import Bar, Report, Row
from timing import Rounds, Run, alternate
from trainer import RANK, InProcess

from homefire.wire.engine import Arrays

FULL = "full parameter, forward_backward"
LORA = f"LoRA r{RANK}, forward_backward"
PADDED = "padded Hugging Face loop"
PEFT = f"peft r{RANK}, padded"
_RIVAL_SHAPES = ("8x128", "mixed")
"""At 32x256 nothing is padded, and full logits of 8192 tokens only cost memory."""


def measure(
    report: Report, models: list[Model], root: Path, *, rounds: int, shapes: list[str]
) -> None:
    for model in models:
        full, lora = InProcess(model, root), InProcess(model, root)
        slots = full.open_full(), lora.open_lora()
        padded, peft = PaddedLoop(model), PaddedLoop(model, lora=True)
        for shape in shapes:
            batch = make_batch(SHAPES[shape], model.vocab_size)
            candidates: dict[str, Run] = {
                FULL: _pass(full, slots[0], batch),
                LORA: _pass(lora, slots[1], batch),
            }
            if shape in _RIVAL_SHAPES:
                candidates[PADDED] = _loop(padded, batch)
            if shape == "8x128":
                candidates[PEFT] = _loop(peft, batch)
            # The largest batch takes as long as all the others: it runs once.
            found = alternate(candidates, rounds=rounds if shape in _RIVAL_SHAPES else 1)
            report.add(*_rows(found, model, shape, sum(SHAPES[shape])))
            if model.name == "small":
                report.add(*_bars(found, shape, 6 * model.num_parameters * sum(SHAPES[shape])))
        _measure_steps(report, model, [(full, slots[0]), (lora, slots[1])], rounds=rounds)


def _pass(engine: InProcess, slot: str, batch: Arrays) -> Run:
    return lambda: engine.forward_backward(slot, batch)


def _loop(loop: PaddedLoop, batch: Arrays) -> Run:
    return lambda: loop.forward_backward(batch)


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
    report: Report, model: Model, engines: list[tuple[InProcess, str]], *, rounds: int
) -> None:
    steps: dict[str, Run] = {
        f"optim_step of {slot.rstrip('0')}": _step(engine, slot) for engine, slot in engines
    }
    found = alternate(steps, rounds=max(3, rounds))
    report.add(*(Row(model.name, "-", what, t.cpu_s) for what, t in found.times.items()))


def _step(engine: InProcess, slot: str) -> Run:
    return lambda: engine.step(slot)
