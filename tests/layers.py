"""Runs the test layers one after another and prints what each took of its time budget.

    python tests/layers.py              all layers
    python tests/layers.py unit docs    some of them
    python tests/layers.py clients      the contract tests of every client, not of the core only
    python tests/layers.py --workers 1  in one process; by default two, where there are two cores

The workers share a layer by whole files, so that what a module sets up is set up once. A layer over its budget is reported, not failed: correctness never depends on timing.
"""

from __future__ import annotations

import argparse
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
    "parity": 150,
    "contract": 420,
    "journeys": 300,
    "faults": 360,
    "docs": 60,
    "clients": 1800,
}
"""Of the layers, and of `clients`, which is asked for by name; with two workers on two cores."""


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


def default_workers() -> int:
    """Two: a test runs servers and clients of its own, and more at once starve one another."""
    return min(2, len(os.sched_getaffinity(0)))


def run_layer(layer: str, *, workers: int) -> LayerResult:
    print(f"\n=== {layer} (budget {BUDGETS_S[layer]} s, workers: {workers})", flush=True)
    started = time.monotonic()
    marks, tests = "not gpu and not long and not clients", TESTS / layer
    if layer == "clients":
        marks, tests = "not gpu and not long", TESTS / "contract"
    command = [sys.executable, "-m", "pytest", "-q", "-m", marks, *in_workers(workers), str(tests)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    status = subprocess.run(command, env=environment, cwd=TESTS.parent, check=False).returncode
    return LayerResult(layer, status, time.monotonic() - started)


def in_workers(number: int) -> list[str]:
    """Files go out in the order of `tests/conftest.py`, the longest first."""
    if number == 1:
        return ["-p", "no:xdist"]
    return ["-n", str(number), "--dist", "loadfile", "--no-loadscope-reorder"]


def report(results: list[LayerResult]) -> None:
    print(f"\n{'layer':<10} {'seconds':>8} {'budget':>7}  result")
    for result in results:
        budget = BUDGETS_S[result.layer]
        print(f"{result.layer:<10} {result.seconds:8.1f} {budget:7d}  {result.verdict}")
    total, allowed = sum(r.seconds for r in results), sum(BUDGETS_S[r.layer] for r in results)
    print(f"{'all':<10} {total:8.1f} {allowed:7d}", flush=True)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Runs the layers of the tests.")
    parser.add_argument("layers", nargs="*", metavar="layer", help=", ".join(BUDGETS_S))
    parser.add_argument(
        "--workers",
        type=int,
        default=os.environ.get("HOMEFIRE_TEST_WORKERS") or default_workers(),
        help="processes that share a layer (or HOMEFIRE_TEST_WORKERS); here %(default)s",
    )
    options = parser.parse_args(arguments)
    for layer in options.layers:
        if layer not in BUDGETS_S:
            parser.error(f"unknown layer {layer!r}; there are: {', '.join(BUDGETS_S)}")
    if options.workers < 1:
        parser.error(f"--workers is {options.workers}; it is at least 1")
    results = [run_layer(each, workers=options.workers) for each in options.layers or LAYERS]
    report(results)
    return max(result.status for result in results)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
