"""The autograd graph of a pass: what is planned for it, and what became of it.

A custom loss needs the logprobs of a `forward` before its `forward_backward` can be asked for. An
engine that kept the forward's graph answers the second call with a backward alone.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec


class GraphUse(StrEnum):
    """What a pass plans for the autograd graph that leads to its logprobs."""

    NONE = "none"
    """Used up at once, or never built."""
    KEEP = "keep"
    """Of a forward: kept, under the engine's bounds, for the backward that may follow."""
    REUSE = "reuse"
    """Of a forward_backward: taken from the forward of the same rows, targets and plan, if it is
    still kept; else that forward runs again, with the same bits."""


class GraphFate(StrEnum):
    """What became of the autograd graph of a pass."""

    FREED = "freed"
    """It ended with the pass, if there was one."""
    KEPT = "kept"
    """It waits for its backward."""
    REUSED = "reused"
    """An earlier forward's served the backward: no forward ran."""
    RECOMPUTED = "recomputed"
    """The earlier forward's was gone, so that forward ran again."""


class HeldGraphs(msgspec.Struct, frozen=True):
    """What an engine keeps at the moment."""

    num_passes: int = 0
    size_bytes: int = 0
