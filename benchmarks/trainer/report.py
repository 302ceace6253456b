"""Rows and bars of the trainer's benchmark: a table for people, JSON for the next run."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True)
class Row:
    """One measurement.

    Example: Row("small", "8x128", "full parameter", 0.42, tokens=1024, gemm_share=0.71)
    """

    model: str
    shape: str
    what: str
    seconds: float
    """Median over the rounds: CPU time in process, wall time through HTTP."""
    tokens: int = 0
    gemm_share: float | None = None
    """6 N tokens / seconds / GEMM rate of the same rounds."""


@dataclass(frozen=True)
class Bar:
    """A figure that was promised.

    Example: Bar("padded loop / ours, mixed rows", 1.92, at_least=1.7)
    """

    what: str
    value: float
    at_least: float | None = None
    at_most: float | None = None
    limited_by: str = ""
    """What stands in the way; said only where the bar is missed."""

    @property
    def is_met(self) -> bool:
        return (self.at_least is None or self.value >= self.at_least) and (
            self.at_most is None or self.value <= self.at_most
        )

    @property
    def verdict(self) -> str:
        if self.is_met:
            return "met"
        bar = self.at_least if self.at_least is not None else self.at_most
        assert bar is not None
        missed_by = f"missed by {abs(1 - self.value / bar):.0%}"
        return f"{missed_by}: {self.limited_by}" if self.limited_by else missed_by

    @property
    def wanted(self) -> str:
        return f">= {self.at_least:g}" if self.at_least is not None else f"<= {self.at_most:g}"


@dataclass
class Report:
    rows: list[Row] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)
    notes: dict[str, float] = field(default_factory=dict)
    """Figures that are neither a time nor promised, with their unit in the name."""

    def add(self, *found: Row | Bar) -> None:
        """Shown at once: a run takes minutes."""
        for item in found:
            if isinstance(item, Row):
                self.rows.append(item)
                print(_row_line(item), flush=True)
            else:
                self.bars.append(item)
                print(_bar_line(item), flush=True)

    def note(self, **figures: float) -> None:
        self.notes |= figures
        for name, value in figures.items():
            print(f"  {name:<66} {value:10.2f}", flush=True)

    def seconds(self, model: str, shape: str, what: str) -> float:
        """Of a row that was measured before."""
        return next(
            row.seconds
            for row in self.rows
            if (row.model, row.shape, row.what) == (model, shape, what)
        )

    def write(self, path: Path, *, quick: bool, load: float) -> None:
        record = {
            "commit": commit(),
            "date": time.strftime("%Y-%m-%d"),
            "quick": quick,
            "load_at_start": round(load, 2),
            "hardware": hardware(),
            "rows": [asdict(row) for row in self.rows],
            "bars": [
                asdict(bar) | {"met": bar.is_met, "verdict": bar.verdict} for bar in self.bars
            ],
            "notes": self.notes,
        }
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(record, indent=2) + "\n")

    def summary(self) -> None:
        """The whole run again, without what was printed between."""
        print("\nrows")
        for row in self.rows:
            print(_row_line(row))
        print("\nbars")
        for bar in self.bars:
            print(_bar_line(bar))


def _row_line(row: Row) -> str:
    rate = f"{row.tokens / row.seconds:9.0f} tok/s" if row.tokens else ""
    share = f"{row.gemm_share:5.2f} of GEMM" if row.gemm_share is not None else ""
    name = f"{row.model} {row.shape}"
    return f"  {name:<14} {row.what:<58} {1000 * row.seconds:10.1f} ms {rate} {share}"


def _bar_line(bar: Bar) -> str:
    return f"  {bar.what:<66} {bar.value:10.2f}  {bar.wanted:<9} {bar.verdict}"


def commit() -> str:
    run = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
        cwd=REPOSITORY,
    )
    return run.stdout.strip() or "unknown"


def hardware() -> dict[str, str | int | bool]:
    return {
        "processor": _processor(),
        "cores": os.cpu_count() or 0,
        "memory_gib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 30,
        "vector_width": torch.backends.cpu.get_cpu_capability(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
