"""Runs the test layers one after another and prints what each took of its time budget.

    python tests/layers.py              all layers
    python tests/layers.py unit docs    some of them
    python tests/layers.py clients      the contract tests of every client, not of the core only

A layer over its budget is reported, not failed: correctness never depends on timing.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).parent
LAYERS = ("unit", "parity", "contract", "journeys", "faults", "docs")
BUDGETS_S = {
    "unit": 180,
    "parity": 120,
    "contract": 400,
    "journeys": 480,
    "faults": 240,
    "docs": 60,
    "clients": 2400,
}
"""Of the layers, and of `clients`, which is asked for by name."""


@dataclass(frozen=True)
class LayerResult:
    layer: str
    status: int
    seconds: float

    @property
    def verdict(self) -> str:
        if self.status != 0:
            return "FAILED"
        return "ok" if self.seconds <= BUDGETS_S[self.layer] else "ok, over budget"


def run_layer(layer: str) -> LayerResult:
    print(f"\n=== {layer} (budget {BUDGETS_S[layer]} s)", flush=True)
    started = time.monotonic()
    marks, tests = "not gpu and not long and not clients", TESTS / layer
    if layer == "clients":
        marks, tests = "not gpu and not long", TESTS / "contract"
    command = [sys.executable, "-m", "pytest", "-q", "-m", marks, str(tests)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    status = subprocess.run(command, env=environment, cwd=TESTS.parent, check=False).returncode
    return LayerResult(layer, status, time.monotonic() - started)


def report(results: list[LayerResult]) -> None:
    print(f"\n{'layer':<10} {'seconds':>8} {'budget':>7}  result")
    for result in results:
        budget = BUDGETS_S[result.layer]
        print(f"{result.layer:<10} {result.seconds:8.1f} {budget:7d}  {result.verdict}")
    total, allowed = sum(r.seconds for r in results), sum(BUDGETS_S[r.layer] for r in results)
    print(f"{'all':<10} {total:8.1f} {allowed:7d}", flush=True)


def main(layers: list[str]) -> int:
    unknown = [layer for layer in layers if layer not in BUDGETS_S]
    if unknown:
        print(f"unknown layer {unknown[0]!r}; there are: {', '.join(BUDGETS_S)}", file=sys.stderr)
        return 2
    results = [run_layer(layer) for layer in layers or LAYERS]
    report(results)
    return max(result.status for result in results)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
