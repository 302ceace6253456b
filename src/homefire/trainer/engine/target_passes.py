"""Forward and backward of passes that end in logprobs of targets, micro-batch by micro-batch.

Axes: T tokens of all rows, K targets per token.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from homefire.trainer.engine.batch import Batch, MicroBatch, micro_batches
from homefire.trainer.engine.held_graphs import HeldPasses, PassKey
from homefire.trainer.engine.losses import Loss, evaluate
from homefire.trainer.engine.network import Float32, FrozenWeights, Ints, TrainableWeights
from homefire.trainer.engine.slots import Slot
from homefire.wire.engine import ExecutionPlan
from homefire.wire.graphs import GraphFate, GraphUse


def forward(
    slot: Slot, batch: Batch, plan: ExecutionPlan, held: HeldPasses
) -> tuple[Float32, GraphFate]:
    """Logprobs [T, K]; their graph is kept where the plan says so and the slot can be trained."""
    held.make_way()
    if slot.trained is not None and plan.graph is GraphUse.KEEP:
        return _forward_to_keep(slot.name, slot.trained, batch, plan, held)

    def run(cut: MicroBatch) -> Float32:
        return slot.weights.logprobs(cut.batch.packed())

    return _run_plan(batch, plan, run), GraphFate.FREED


def backward(
    name: str,
    trained: TrainableWeights,
    batch: Batch,
    plan: ExecutionPlan,
    loss: Loss,
    held: HeldPasses,
) -> tuple[Float32, GraphFate]:
    """Logprobs [T, K], with d loss / d weights in the gradient aside; `name` is the slot's."""

    def gradient(cut: MicroBatch, logprobs: Float32) -> Float32:
        return evaluate(loss, logprobs, cut.batch).gradient.astype(np.float32)

    if plan.graph is GraphUse.REUSE:
        key = PassKey.of(name, batch, plan)
        return _backward_of_graph(key, trained, batch, plan, gradient, held)
    held.make_way()

    def run(cut: MicroBatch) -> Float32:
        return trained.backward(cut.batch.packed(), lambda logprobs: gradient(cut, logprobs))

    return _run_plan(batch, plan, run), GraphFate.FREED


def fused_backward(
    trained: TrainableWeights, batch: Batch, plan: ExecutionPlan, loss: Loss
) -> Float32:
    """`backward`, bit for bit, of a loss whose derivative at a token depends on that token alone."""

    def run(cut: MicroBatch) -> Float32:
        def gradient_of(logprobs: Float32, span: slice) -> Float32:
            return evaluate(loss, logprobs, cut.batch.span(span)).gradient.astype(np.float32)

        return trained.fused_backward(cut.batch.packed(), gradient_of)

    return _run_plan(batch, plan, run)


def likeliest(
    weights: FrozenWeights, batch: Batch, plan: ExecutionPlan, count: int
) -> tuple[Float32, Ints]:
    """The likeliest next tokens' logprobs and ids, both [T, count]."""
    logprobs = np.zeros((len(batch.tokens), count), np.float32)
    tokens = np.zeros(logprobs.shape, np.int64)
    for cut in micro_batches(batch, plan):
        found = weights.likeliest(cut.batch.packed(), count)
        logprobs[cut.places], tokens[cut.places] = found
    return logprobs, tokens


def _forward_to_keep(
    name: str, trained: TrainableWeights, batch: Batch, plan: ExecutionPlan, held: HeldPasses
) -> tuple[Float32, GraphFate]:
    kept = held.begin(PassKey.of(name, batch, plan), len(batch.tokens))

    def run(cut: MicroBatch) -> Float32:
        return kept.logprobs(trained, cut.batch.packed())

    logprobs = _run_plan(batch, plan, run)
    return logprobs, GraphFate.KEPT if kept.finish() else GraphFate.FREED


def _backward_of_graph(
    key: PassKey,
    trained: TrainableWeights,
    batch: Batch,
    plan: ExecutionPlan,
    gradient: Callable[[MicroBatch, Float32], Float32],
    held: HeldPasses,
) -> tuple[Float32, GraphFate]:
    """The kept graphs, or the same built again; either way the same computation pushes through them."""
    found = held.take(key)
    if found is None:
        held.make_way()

    def run(cut: MicroBatch) -> Float32:
        graph = trained.graph(cut.batch.packed()) if found is None else found.next()
        logprobs = graph.logprobs
        graph.backward(gradient(cut, logprobs))
        return logprobs

    logprobs = _run_plan(batch, plan, run)
    return logprobs, GraphFate.RECOMPUTED if found is None else GraphFate.REUSED


def _run_plan(batch: Batch, plan: ExecutionPlan, run: Callable[[MicroBatch], Float32]) -> Float32:
    """Logprobs [T, K] in the order of the request."""
    logprobs = np.zeros(batch.targets.shape, np.float32)
    for cut in micro_batches(batch, plan):
        logprobs[cut.places] = run(cut)
    return logprobs
