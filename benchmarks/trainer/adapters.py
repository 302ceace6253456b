"""Four adapters, two rows each, in one packed pass: beside one adapter with all the rows."""

from __future__ import annotations

from pathlib import Path

from batches import SHAPES, make_batch
from models import Model
from report import Bar, Report, Row
from timing import alternate
from trainer import RANK, InProcess

ONE = f"LoRA r{RANK}, one adapter"
FOUR = f"LoRA r{RANK}, four adapters in one pass"
APART = f"LoRA r{RANK}, four adapters one by one"


def measure(report: Report, model: Model, root: Path, *, rounds: int, shapes: list[str]) -> None:
    engine = InProcess(model, root)
    slots = [engine.open_lora(number) for number in range(4)]
    engine.warm_up(slots[0])
    for shape in shapes:
        lengths = SHAPES[shape]
        whole = make_batch(lengths, model.vocab_size)
        quarters = [make_batch(lengths[i::4], model.vocab_size, seed=i) for i in range(4)]
        members = list(zip(slots, quarters, strict=True))
        found = alternate(
            {
                ONE: lambda whole=whole: engine.forward_backward(slots[0], whole),
                FOUR: lambda members=members: engine.forward_backward_packed(members),
                APART: lambda members=members: [
                    engine.forward_backward(slot, quarter) for slot, quarter in members
                ],
            },
            rounds=rounds if shape == "8x128" else 1,
        )
        tokens, flops = sum(lengths), 6 * model.num_parameters * sum(lengths)
        for what, times in found.times.items():
            share = found.gemm_share(what, flops)
            report.add(Row(model.name, shape, what, times.cpu_s, tokens, share))
        if model.name == "small" and shape == "8x128":
            ratio = found.times[ONE].cpu_s / found.times[FOUR].cpu_s
            report.add(
                Bar(
                    "one adapter / four in one pass, 8x128",
                    ratio,
                    at_least=0.92,
                    limited_by="small products per adapter and layer; a head per adapter",
                )
            )
