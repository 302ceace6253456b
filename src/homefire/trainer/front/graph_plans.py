"""Which passes plan to keep a graph, and which to reuse one; decided before a pass is journaled.

A custom loss is a `forward` with cross_entropy, then a `forward_backward` with cross_entropy on the
same rows and targets, in chunks that arrive in any order. Nothing on the wire tells such a forward from
one for evaluation: clients send the weights that the user's datums have. So each of them plans to
keep its graph, which costs memory only, within the engine's bounds.

A backward plans to reuse a graph only if such a forward came before it on the model, so that the plan
says what the numbers are made of. It holds whether or not the engine still has the graph.
"""

from __future__ import annotations

import hashlib

from homefire.trainer.front.operations import OperationKind
from homefire.wire.engine import ExecutionPlan
from homefire.wire.graphs import GraphUse
from homefire.wire.tinker import Pass

_MAX_FORWARDS = 4096
"""Remembered per model; a custom loss has one per chunk."""
_LEAVE_WEIGHTS = frozenset(
    {
        OperationKind.FORWARD,
        OperationKind.FORWARD_BACKWARD,
        OperationKind.SAVE_WEIGHTS,
        OperationKind.SAVE_WEIGHTS_FOR_SAMPLER,
        OperationKind.SAVE_WEIGHTS_EXTERNAL,
    }
)


def graph_key(body: Pass, plan: ExecutionPlan) -> str | None:
    """What a forward and the backward of its graph have in common; None for other passes.

    Takes milliseconds per MB.
    """
    if body.loss_fn != "cross_entropy" or body.loss_fn_config:
        return None
    digest = hashlib.sha256(repr((plan.micro_batches, plan.threads)).encode())
    for row in body.rows:
        targets = row.inputs.get("target_tokens")
        if targets is None:
            return None
        digest.update(repr((row.num_tokens, targets.dtype, targets.shape)).encode())
        digest.update(row.tokens)
        digest.update(targets.data)
    return digest.hexdigest()


class GraphPlans:
    """What each model's forwards keep. Owned by the front's event loop; lost with it, as graphs are."""

    def __init__(self) -> None:
        self._kept: dict[str, list[str]] = {}

    def use(self, model: str, kind: OperationKind, key: str | None) -> GraphUse:
        """Of a request that is about to be journaled, in the order of acceptance."""
        if kind not in _LEAVE_WEIGHTS:
            self._kept.pop(model, None)
        if key is None:
            return GraphUse.NONE
        kept = self._kept.setdefault(model, [])
        if kind is OperationKind.FORWARD:
            kept.append(key)
            del kept[:-_MAX_FORWARDS]
            return GraphUse.KEEP
        if key not in kept:
            return GraphUse.NONE
        kept.remove(key)
        return GraphUse.REUSE
