"""How fast the trainer is, beside what the same processor gives a bare matrix product.

    make bench-trainer              prints a table, writes benchmarks/results/trainer.json and the table
                                    of docs/performance.md
    make bench-trainer ARGS=--quick two minutes instead of six, and writes nothing
    make bench-trainer ARGS="--only custom_loss overhead"
    make bench-trainer ARGS=--gpu   on one GPU instead, and writes benchmarks/results/trainer_gpu.json

One thread. In process the times are CPU time, through HTTP wall time; what is compared is measured in
turns, with the bare product in each round. Each section is a module with a
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
import page
import passes
import torch
from report import Report
from trainer import one_thread
from transformers.utils import logging as transformers_logging

import gpu

GPU_RESULTS = page.RESULTS.with_name("trainer_gpu.json")
SECTIONS = ("passes", "adapters", "custom_loss", "overhead", "client", "memory")


def main() -> None:
    arguments = _arguments()
    load = os.getloadavg()[0]
    if arguments.gpu:
        measure_gpu(load)
        return
    started = time.perf_counter()
    one_thread()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    report = Report()
    with tempfile.TemporaryDirectory(prefix="homefire-bench-") as directory:
        sections = _sections(Path(directory), quick=arguments.quick)
        chosen = arguments.only or list(sections)
        for number, name in enumerate(chosen, 1):
            spent = time.perf_counter() - started
            print(f"\n[{number}/{len(chosen)}] {name}, after {spent:.0f} s", flush=True)
            sections[name](report)
    report.note(total_s=time.perf_counter() - started, load_at_start=load)
    report.summary()
    if not arguments.quick and not arguments.only:
        report.write(page.RESULTS, quick=arguments.quick, load=load)
        page.update()
        print(f"\nwrote {page.RESULTS} and the table of {page.PAGE}")


def measure_gpu(load: float) -> None:
    """Alone: its figures have nothing to do with those of one thread."""
    if not torch.cuda.is_available():
        raise SystemExit(f"--gpu: torch {torch.__version__} sees no GPU")
    transformers_logging.disable_progress_bar()
    report = Report()
    print(torch.cuda.get_device_name(), flush=True)
    with tempfile.TemporaryDirectory(prefix="homefire-bench-") as directory:
        gpu.measure(report, Path(directory))
    report.summary()
    report.write(GPU_RESULTS, quick=False, load=load)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench-trainer", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round, no 32x256 batches")
    parser.add_argument(
        "--only", nargs="*", choices=SECTIONS, help="these sections; writes nothing"
    )
    parser.add_argument("--gpu", action="store_true", help="Qwen3 of 0.6, 4 and 8 B on one GPU")
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
