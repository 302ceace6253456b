"""How rows of tokens go through a model."""

from __future__ import annotations

from enum import StrEnum


class RowLayout(StrEnum):
    PACKED = "packed"
    """End to end in one sequence: attention is all that passes between tokens, and it keeps rows apart."""
    PADDED = "padded"
    """Each row for itself, padded on the right: layers carry state from token to token (Mamba, gated
    delta nets, short convolutions), which would run on from one packed row into the next."""
