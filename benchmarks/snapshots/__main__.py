"""How small snapshots are, how fast they are made, checked and served, and what a save costs training.

    make bench-snapshots                  about five minutes; writes benchmarks/results/snapshots.json
    make bench-snapshots ARGS=--quick     one round of everything on a model that is less warm

One thread for the trainer and one for the replica: give it two idle cores.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import chain
import codec
import journey
import torch
import transformers
from report import Report
from weights import train

SECTIONS = ("codec", "journey", "chain")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round, a shorter training")
    parser.add_argument("--only", choices=SECTIONS, help="one section; nothing is written")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    report = Report(options.quick)
    with tempfile.TemporaryDirectory(prefix="homefire-bench-") as folder:
        run(report, Path(folder), options.only)
    if options.only is None:
        report.write()


def run(report: Report, directory: Path, only: str | None) -> None:
    quick = report.quick
    if only != "chain":
        steps = (10, 2) if quick else (200, 20)
        report.say(f"training a 33 M model for {sum(steps)} steps, on all cores")
        torch.set_num_threads(os.cpu_count() or 1)
        trained = train(directory / "model", warm_steps=steps[0], settling_steps=steps[1])
        torch.set_num_threads(1)
        if only in (None, "codec"):
            size = 40_000_000 if quick else 300_000_000
            codec.measure(report, trained, rounds=1 if quick else 3, num_stand_in=size)
        model = trained.directory
        del trained
        if only in (None, "journey"):
            journey.measure(report, model, directory, rounds=1 if quick else 5)
    if only in (None, "chain"):
        num_deltas, num_points = (60, 10) if quick else (300, 100)
        chain.measure(report, directory, num_deltas=num_deltas, num_points=num_points)


if __name__ == "__main__":
    main()
