"""How a batch is cut into micro-batches. Pure and deterministic: the plan is journaled and replayed."""

from __future__ import annotations

from collections.abc import Sequence

from homefire.wire.engine import ExecutionPlan
from homefire.wire.specs import ActivationBudget


def execution_plan(
    lengths: Sequence[int],
    *,
    token_budget: int,
    threads: int,
    ranks: int = 1,
    activations: ActivationBudget | None = None,
) -> ExecutionPlan:
    """The cut of a batch of rows of these lengths, `token_budget` tokens at most for each rank; what
    of a micro-batch is over the budget of activations is recomputed."""
    cut = micro_batches(lengths, token_budget=token_budget, ranks=ranks)
    return ExecutionPlan(
        micro_batches=[[row for rows in shares for row in rows] for shares in cut],
        threads=threads,
        shares=[[len(rows) for rows in shares] for shares in cut] if ranks > 1 else [],
        recompute=_recompute(lengths, cut, activations) if activations else [],
    )


def _recompute(
    lengths: Sequence[int], cut: list[list[list[int]]], activations: ActivationBudget
) -> list[int]:
    """By the largest share of each micro-batch; empty where all is kept."""
    largest = [max(sum(lengths[row] for row in rows) for rows in shares) for shares in cut]
    found = [recomputed_layers(num_tokens, activations) for num_tokens in largest]
    return found if any(found) else []


def recomputed_layers(num_tokens: int, activations: ActivationBudget) -> int:
    """The fewest layers whose recomputation keeps a pass of so many tokens within the budget; all of
    them where none do.

    Example: 8 layers of 100 bytes a token, 10 of them inputs, keep 8000 bytes of 10 tokens; at most
    5000 are kept by recomputing 4: 4 x 1000 + 4 x 100.
    """
    surplus = num_tokens * activations.layer_token_bytes * activations.num_layers
    surplus -= activations.max_bytes
    saved = num_tokens * (activations.layer_token_bytes - activations.input_token_bytes)
    if surplus <= 0 or saved <= 0:
        return 0
    return min(activations.num_layers, -(-surplus // saved))


def micro_batches(
    lengths: Sequence[int], *, token_budget: int, ranks: int = 1
) -> list[list[list[int]]]:
    """Row indices by micro-batch and rank, longest rows first, each to the rank with the fewest tokens,
    up to `token_budget` tokens a rank.

    Neighbours have similar lengths, which is what packed attention likes. A row longer than the
    budget gets a share of its own.

    Example: micro_batches([3, 9, 4], token_budget=8) == [[[1]], [[2, 0]]].
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    batches: list[list[list[int]]] = []
    filled: list[int] = []
    for row in order:
        rank = filled.index(min(filled)) if filled else 0
        if not filled or (filled[rank] and filled[rank] + lengths[row] > token_budget):
            batches.append([[] for _ in range(ranks)])
            filled, rank = [0] * ranks, 0
        batches[-1][rank].append(row)
        filled[rank] += lengths[row]
    return batches
