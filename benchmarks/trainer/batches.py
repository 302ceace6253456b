"""The measured batches: next-token prediction of random rows, every token with weight 1."""

from __future__ import annotations

import msgspec
import numpy as np

from homefire.control.footprint import MICRO_BATCH_TOKENS
from homefire.trainer.front.plan import execution_plan
from homefire.wire.engine import Arrays, ExecutionPlan
from homefire.wire.graphs import GraphUse

SHAPES = {
    "8x128": [128] * 8,
    "32x256": [256] * 32,
    "mixed": [192, 64, 512, 320, 128, 448, 256, 384],
}
TOKEN_BUDGET = MICRO_BATCH_TOKENS
"""A job's on a machine with memory to spare."""


def make_batch(lengths: list[int], vocab_size: int, seed: int = 0) -> Arrays:
    generator = np.random.default_rng(seed)
    total = sum(lengths)
    return {
        "tokens": generator.integers(0, vocab_size, total).astype(np.int32),
        "lengths": np.array(lengths, np.int32),
        "target_tokens": generator.integers(0, vocab_size, (total, 1)),
        "weights": np.ones((total, 1), np.float32),
    }


def plan_of(
    arrays: Arrays, *, token_budget: int = TOKEN_BUDGET, graph: GraphUse = GraphUse.NONE
) -> ExecutionPlan:
    """As the front cuts it."""
    plan = execution_plan(arrays["lengths"].tolist(), token_budget=token_budget, threads=1)
    return msgspec.structs.replace(plan, graph=graph)
