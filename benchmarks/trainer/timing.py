"""Fair times on a machine that is never quite idle.

Candidates alternate inside a round, each round brackets the bare matrix product, and medians over the
rounds are reported: a slow minute slows all of them, and their ratios hold.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Run = Callable[[], object]
_GEMM = (2048, 512, 1536)
_GEMM_REPEATS = 8


@dataclass(frozen=True)
class Times:
    wall_s: float
    cpu_s: float
    """Of this process."""


@dataclass(frozen=True)
class Rounds:
    """Medians over the rounds."""

    times: dict[str, Times]
    gemm_flops: float
    """float32 FLOP per second of CPU time."""

    def gemm_share(self, name: str, flops: float) -> float:
        return flops / self.times[name].cpu_s / self.gemm_flops


def alternate(
    candidates: Mapping[str, Run],
    *,
    rounds: int,
    before: Mapping[str, Run] | None = None,
) -> Rounds:
    """Each candidate runs once per round, after what `before` has for it, unmeasured.

    Nothing runs unmeasured at full size: callers warm their candidates up with something small.
    """
    before = before or {}
    seen: dict[str, list[Times]] = {name: [] for name in candidates}
    rates: list[float] = []
    for _ in range(rounds):
        rates.append(gemm_rate())
        for name, run in candidates.items():
            before.get(name, _nothing)()
            seen[name].append(timed(run))
    return Rounds({name: _median(times) for name, times in seen.items()}, statistics.median(rates))


def _nothing() -> None:
    """Before a candidate that needs nothing."""


def timed(run: Run) -> Times:
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return Times(time.perf_counter() - wall, time.process_time() - cpu)


def gemm_rate() -> float:
    """float32 FLOP per second of CPU time, of a product like those of the models measured here."""
    m, k, n = _GEMM
    left, right = torch.ones(m, k), torch.ones(n, k)
    torch.nn.functional.linear(left, right)
    times = [timed(lambda: torch.nn.functional.linear(left, right)) for _ in range(_GEMM_REPEATS)]
    return 2 * m * k * n / statistics.median(t.cpu_s for t in times)


def _median(times: list[Times]) -> Times:
    return Times(
        statistics.median(t.wall_s for t in times), statistics.median(t.cpu_s for t in times)
    )
