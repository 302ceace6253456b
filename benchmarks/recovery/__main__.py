"""What durability costs, and what a death costs: journal, recovery, kills, overload, memory.

    make bench-recovery                  prints a table, writes benchmarks/results/recovery.json
    make bench-recovery ARGS=--quick     two minutes instead of six, and writes nothing
    make bench-recovery ARGS="--only bodies samples"

Wall time, with client and server on one machine. Each section is a function of `(report, root, quick)`.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "trainer"))  # report, models, the idle engine

import journal_cost
import kills
import overload
from report import REPOSITORY, Report

RESULTS = REPOSITORY / "benchmarks" / "results" / "recovery.json"
SECTIONS = {
    "journal": journal_cost.measure,
    "kills": kills.measure,
    "bodies": overload.bodies,
    "samples": overload.samples,
}


def main() -> None:
    arguments = _arguments()
    load, started = os.getloadavg()[0], time.perf_counter()
    report = Report()
    with tempfile.TemporaryDirectory(prefix="homefire-bench-") as directory:
        for name, section in SECTIONS.items():
            if not arguments.only or name in arguments.only:
                print(f"\n{name}", flush=True)
                section(report, Path(directory), quick=arguments.quick)
    report.note(total_s=time.perf_counter() - started, load_at_start=load)
    report.summary()
    if not arguments.quick and not arguments.only:
        report.write(RESULTS, quick=arguments.quick, load=load)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench-recovery", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer operations, bodies and samples")
    parser.add_argument("--only", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    return parser.parse_args()


if __name__ == "__main__":
    main()
