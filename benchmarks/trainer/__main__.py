"""How fast the trainer is, beside what the same processor gives a bare matrix product.

    make bench-trainer              prints a table, writes benchmarks/results/trainer.json
    make bench-trainer ARGS=--quick a minute instead of six, and writes nothing

One thread. In process the times are CPU time, through HTTP wall time. Each section is a module with a
`measure`, and takes the rows of sections before it from the report where a bar compares them.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import adapters
import client
import custom_loss
import memory
import models
import overhead
import passes
from report import REPOSITORY, Report
from trainer import one_thread
from transformers.utils import logging as transformers_logging

RESULTS = REPOSITORY / "benchmarks" / "results" / "trainer.json"


def main() -> None:
    arguments = _arguments()
    load = os.getloadavg()[0]
    started = time.perf_counter()
    one_thread()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    report = Report()
    with tempfile.TemporaryDirectory(prefix="homefire-bench-") as directory:
        for name, section in _sections(Path(directory), quick=arguments.quick).items():
            if not arguments.only or name in arguments.only:
                print(f"\n{name}", flush=True)
                section(report)
    report.note(total_s=time.perf_counter() - started, load_at_start=load)
    report.summary()
    if not arguments.quick and not arguments.only:
        report.write(RESULTS, quick=arguments.quick, load=load)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench-trainer", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round, no 32x256 batches")
    parser.add_argument("--only", nargs="*", metavar="SECTION", help="passes, …")
    return parser.parse_args()


def _sections(root: Path, *, quick: bool) -> dict[str, Callable[[Report], None]]:
    tiny, small = models.make_tiny(root), models.make_small(root)
    rounds = 1 if quick else 3
    shapes = ["8x128", "mixed"] if quick else ["8x128", "mixed", "32x256"]
    return {
        "passes": lambda report: passes.measure(
            report, [tiny, small], root, rounds=rounds, shapes=shapes
        ),
        "adapters": lambda report: adapters.measure(
            report, small, root, rounds=rounds, shapes=["8x128"] if quick else ["8x128", "mixed"]
        ),
        "custom_loss": lambda report: custom_loss.measure(report, small, root, rounds=rounds),
        "overhead": lambda report: overhead.measure(report, root, repeats=20 if quick else 50),
        "client": lambda report: client.measure(
            report, small, root, rounds=rounds, shapes=["8x128"] if quick else ["8x128", "mixed"]
        ),
        "memory": lambda report: memory.measure(report, small, root),
    }


if __name__ == "__main__":
    main()
