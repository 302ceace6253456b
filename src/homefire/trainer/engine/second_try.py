"""A pass that found no memory runs once more, keeping as little as it can, before it fails.

Its first attempt left nothing behind, and on CPU the second gives the same bits: what was journaled
still says what the numbers are made of.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import msgspec

from homefire.trainer.engine.held_graphs import HeldPasses
from homefire.trainer.engine.network import Network
from homefire.wire.engine import ExecutionPlan
from homefire.wire.errors import OutOfMemory

log = logging.getLogger(__name__)
Result = TypeVar("Result")
Replan = Callable[[ExecutionPlan], ExecutionPlan]


def with_second_try(
    attempt: Callable[[Replan], Result], network: Network, held: HeldPasses
) -> Result:
    """`attempt` runs its plans as it is given them; the second time with every layer recomputed and
    without a graph kept for another pass. It must drop its gradient before it raises."""
    try:
        return attempt(lambda plan: plan)
    except OutOfMemory as exc:
        if not network.num_layers:
            raise
        log.warning("a pass runs again with all its layers recomputed: %s", exc.message)
    # outside of the handler, whose exception refers to the first attempt's tensors
    held.free_all()
    network.free_memory()
    return attempt(lambda plan: keeping_inputs_only(plan, network.num_layers))


def keeping_inputs_only(plan: ExecutionPlan, num_layers: int) -> ExecutionPlan:
    recompute = [num_layers] * len(plan.micro_batches)
    return msgspec.structs.replace(plan, recompute=recompute)
