"""How a batch is cut into micro-batches. Pure and deterministic: the plan is journaled and replayed."""

from __future__ import annotations

from collections.abc import Sequence


def micro_batches(lengths: Sequence[int], *, token_budget: int) -> list[list[int]]:
    """Row indices, longest first, filled greedily up to `token_budget` tokens each.

    Neighbours have similar lengths, which is what packed attention likes. A row longer than the
    budget gets a micro-batch of its own.

    Example: micro_batches([3, 9, 4], token_budget=8) == [[1], [2, 0]].
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    batches: list[list[int]] = []
    filled = 0
    for row in order:
        if not batches or filled + lengths[row] > token_budget:
            batches.append([])
            filled = 0
        batches[-1].append(row)
        filled += lengths[row]
    return batches
