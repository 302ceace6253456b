"""What the engine says about the graphs that it keeps, for the front's status."""

from __future__ import annotations

from homefire.foundation.clock import Clock
from homefire.wire.engine import Rows
from homefire.wire.graphs import GraphFate, HeldGraphs
from homefire.wire.internal import GraphStatus


class GraphBoard:
    """Written by the worker, over all lives of the engine."""

    def __init__(self, clock: Clock, *, limit_s: float) -> None:
        self._clock = clock
        self._limit_s = limit_s
        self._budget_bytes = 0
        self._held = HeldGraphs()
        self._told_at = clock.monotonic()
        self._num_reused = 0
        self._num_recomputed = 0

    def engine_started(self, *, budget_bytes: int) -> None:
        self._budget_bytes = budget_bytes
        self._held = HeldGraphs()

    def note(self, rows: Rows) -> None:
        if rows.held is not None:
            self._held = rows.held
            self._told_at = self._clock.monotonic()
        self._num_reused += rows.graph is GraphFate.REUSED
        self._num_recomputed += rows.graph is GraphFate.RECOMPUTED

    def read(self) -> GraphStatus:
        has_expired = self._clock.monotonic() - self._told_at >= self._limit_s
        held = HeldGraphs() if has_expired else self._held
        return GraphStatus(
            budget_bytes=self._budget_bytes,
            held_bytes=held.size_bytes,
            num_held=held.num_passes,
            num_reused=self._num_reused,
            num_recomputed=self._num_recomputed,
        )
