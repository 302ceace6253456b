"""Prompts that are admitted together, laid out as rows to prefill."""

from __future__ import annotations

from collections.abc import Sequence as Items

from homefire.inference.engine.network import Adapter, PrefillRow
from homefire.inference.engine.protocol import PromptScoring
from homefire.inference.engine.sequence import Sequence


def shared_rows(admitted: Items[Sequence], first_slot: int) -> list[PrefillRow]:
    """Equal prompts under the same weights become one row: a group of n samples is prefilled once, and
    those that want no scores share the row of one that does. Rows of one adapter stand together; of
    these short ones first, so that neighbours of equal length run as one batched attention."""
    scored: dict[tuple[Adapter, tuple[int, ...]], PromptScoring] = {}
    for sequence in admitted:
        if sequence.request.scoring is not None:
            scored.setdefault(_prompt_of(sequence), sequence.request.scoring)
    slots: dict[tuple[Adapter, tuple[int, ...], PromptScoring | None], list[int]] = {}
    for slot, sequence in enumerate(admitted, start=first_slot):
        where = _prompt_of(sequence)
        scoring = sequence.request.scoring or scored.get(where)
        slots.setdefault((*where, scoring), []).append(slot)
    order = {adapter: i for i, (adapter, _, _) in enumerate(slots)}
    rows = [
        PrefillRow(prompt, tuple(row_slots), adapter, scoring)
        for (adapter, prompt, scoring), row_slots in slots.items()
    ]
    return sorted(rows, key=lambda row: (order[row.adapter], len(row.tokens)))


def _prompt_of(sequence: Sequence) -> tuple[Adapter, tuple[int, ...]]:
    return sequence.generation.adapter, sequence.request.prompt
