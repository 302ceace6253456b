"""How close an adaptive window comes to the best fixed one, which nobody knows beforehand.

    make bench-concurrency    prints a table; writes benchmarks/results/concurrency.json and .png

The whole road: `homefire up`, a deployment of `tiny`, the SDK's sampler, five loads. For each load every
fixed window is run, then both rules of the adaptive controller, the same requests each time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from lifecycle import Server, commit
from loop import Controller, Deployment, Run, run_shape
from plot import save_plot
from shapes import SHAPES, Shape

from homefire.sdk import (
    AdaptiveConcurrencyController,
    DeploymentConfig,
    DeploymentManager,
    FixedConcurrencyController,
)

RESULTS = Path(__file__).parent.parent / "results"
FIXED_WINDOWS = (8, 16, 32, 64, 128, 256)
RULES: dict[str, Callable[[], Controller]] = {
    "adaptive, ends of steps": AdaptiveConcurrencyController,
    "adaptive, every 32": lambda: AdaptiveConcurrencyController(adjustment_interval=32),
    "adaptive, every 32, decrease 0.8": lambda: AdaptiveConcurrencyController(
        adjustment_interval=32, multiplicative_decrease=0.8
    ),
}
GOODPUT_BAR = 0.95
QUEUE_BAR = 1.5


@dataclass(frozen=True)
class Row:
    load: str
    controller: str
    goodput: float
    """New tokens per second."""
    of_best_fixed: float
    p99_queue_s: float
    queue_of_best_fixed: float | None
    """None where the best fixed window had no queue."""
    unfairness: float


def measure(
    deployment: Deployment, shape: Shape, *, steps: int, warm_up: int
) -> tuple[list[Row], Run]:
    """The rows of one load, and the run of the first adaptive rule."""
    fixed = {
        f"fixed {size}": run_shape(
            deployment,
            shape,
            lambda size=size: FixedConcurrencyController(size),
            warm_up_steps=1,
            num_steps=steps,
        )
        for size in FIXED_WINDOWS
    }
    adaptive = {
        name: run_shape(deployment, shape, make, warm_up_steps=warm_up, num_steps=steps)
        for name, make in RULES.items()
    }
    best = max(fixed.values(), key=lambda run: run.goodput)
    runs = {**fixed, **adaptive}
    rows = [row_of(shape, name, run, best) for name, run in runs.items()]
    return rows, next(iter(adaptive.values()))


def row_of(shape: Shape, name: str, run: Run, best: Run) -> Row:
    return Row(
        load=shape.name,
        controller=name,
        goodput=run.goodput,
        of_best_fixed=run.goodput / best.goodput,
        p99_queue_s=run.p99_queue_s,
        queue_of_best_fixed=run.p99_queue_s / best.p99_queue_s if best.p99_queue_s else None,
        unfairness=run.unfairness,
    )


def show(row: Row) -> None:
    verdict = ""
    if row.controller in RULES:
        queue = row.queue_of_best_fixed
        met = (row.of_best_fixed >= GOODPUT_BAR, queue is not None and queue <= QUEUE_BAR)
        verdict = "  goodput {}, queue {}".format(*("met" if ok else "MISSED" for ok in met))
    print(
        f"{row.load:<14} {row.controller:<34} {row.goodput:7.0f} tok/s  {row.of_best_fixed:5.2f}  "
        f"p99 queue {row.p99_queue_s:6.2f} s  unfair {row.unfairness:4.2f}{verdict}",
        flush=True,
    )


def deploy(server: Server) -> Deployment:
    manager = DeploymentManager(api_key=server.key, base_url=server.url)
    manager.create_or_get(DeploymentConfig(deployment_id="bench", base_model="tiny"))
    manager.wait_for_ready("bench")
    return Deployment(server.url, server.key, "accounts/local/deployments/bench")


def measure_all(shapes: list[Shape], steps: int, warm_up: int) -> Iterator[tuple[list[Row], Run]]:
    with tempfile.TemporaryDirectory(prefix="homefire-bench-") as home:
        server = Server(Path(home))
        try:
            deployment = deploy(server)
            for number, shape in enumerate(shapes):
                print(f"load {number + 1} of {len(shapes)}: {shape.name}", file=sys.stderr)
                yield measure(deployment, shape, steps=steps, warm_up=warm_up)
        finally:
            server.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4, help="measured steps of each run")
    parser.add_argument(
        "--warm-up", type=int, default=10, help="steps before, for adaptive windows"
    )
    parser.add_argument("--only", choices=[shape.name for shape in SHAPES], help="one load")
    options = parser.parse_args()
    started = time.perf_counter()
    shapes = [shape for shape in SHAPES if options.only in (None, shape.name)]
    rows: list[Row] = []
    runs: dict[str, Run] = {}
    for of_load, run in measure_all(shapes, options.steps, options.warm_up):
        for row in of_load:
            show(row)
        rows += of_load
        runs[of_load[0].load] = run
    if options.only is None:
        save(rows, runs, round(time.perf_counter() - started))


def save(rows: list[Row], runs: dict[str, Run], seconds: int) -> None:
    record = {
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "seconds": seconds,
        "rows": [asdict(row) for row in rows],
    }
    (RESULTS / "concurrency.json").write_text(json.dumps(record, indent=2) + "\n")
    save_plot(runs, RESULTS / "concurrency.png")


if __name__ == "__main__":
    main()
