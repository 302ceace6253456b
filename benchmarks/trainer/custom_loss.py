"""A custom loss: logprobs first, its derivative later. Held graph, two passes, and a loss we know."""

from __future__ import annotations

from pathlib import Path

from batches import SHAPES, make_batch, plan_of
from models import Model
from report import Bar, Report, Row
from timing import alternate
from trainer import InProcess

from homefire.wire.engine import Arrays
from homefire.wire.graphs import GraphUse

HELD = "custom loss, graph held"
TWO_PASS = "custom loss, two passes"
BUILT_IN = "cross_entropy, built in"


def measure(report: Report, model: Model, root: Path, *, rounds: int) -> None:
    engine = InProcess(model, root)
    slot = engine.open_full()
    batch = make_batch(SHAPES["8x128"], model.vocab_size)
    engine.warm_up(slot)
    found = alternate(
        {
            BUILT_IN: lambda: engine.forward_backward(slot, batch),
            HELD: lambda: _custom(engine, slot, batch, GraphUse.KEEP, GraphUse.REUSE),
            TWO_PASS: lambda: _custom(engine, slot, batch, GraphUse.NONE, GraphUse.NONE),
        },
        rounds=rounds,
    )
    seconds = {what: times.cpu_s for what, times in found.times.items()}
    tokens = sum(SHAPES["8x128"])
    flops = 6 * model.num_parameters * tokens
    for what, spent in seconds.items():
        share = found.gemm_share(what, flops)
        report.add(Row(model.name, "8x128", what, spent, tokens, share))
    if model.name == "small":
        report.add(
            Bar(
                "custom loss held / built in, 8x128",
                seconds[HELD] / seconds[BUILT_IN],
                at_most=1.08,
                limited_by="logits but the last chunk's are computed twice where the derivative comes later",
            ),
            Bar("custom loss two passes / held, 8x128", seconds[TWO_PASS] / seconds[HELD], 1.2),
        )


def _custom(
    engine: InProcess, slot: str, batch: Arrays, forward: GraphUse, backward: GraphUse
) -> None:
    """The client's derivative comes back as weights; here those that cross_entropy has."""
    asked = {name: array for name, array in batch.items() if name != "weights"}
    engine.forward(slot, asked, plan_of(batch, graph=forward))
    engine.forward_backward(slot, batch, plan_of(batch, graph=backward))
