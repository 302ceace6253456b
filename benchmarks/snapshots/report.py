"""Rows and bars of the snapshot benchmark: a table for people, JSON for the next run."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results" / "snapshots.json"


@dataclass(frozen=True)
class Row:
    """Example: Row("size of full bf16, one step at 1e-6 (1.3 % changed)", 0.0083, "", at_most=0.010)."""

    what: str
    value: float
    unit: str = ""
    at_most: float | None = None
    at_least: float | None = None

    @property
    def is_met(self) -> bool | None:
        """None where nothing was promised."""
        if self.at_most is None and self.at_least is None:
            return None
        return (self.at_most is None or self.value <= self.at_most) and (
            self.at_least is None or self.value >= self.at_least
        )

    @property
    def bar(self) -> str:
        if self.at_most is not None:
            return f"<= {self.at_most:g}"
        return f">= {self.at_least:g}" if self.at_least is not None else ""


@dataclass
class Report:
    quick: bool
    began_at: float = field(default_factory=time.perf_counter)
    load: float = field(default_factory=lambda: os.getloadavg()[0])
    rows: list[Row] = field(default_factory=list)

    def say(self, text: str) -> None:
        print(f"[{time.perf_counter() - self.began_at:5.0f} s] {text}", flush=True)

    def add(self, what: str, value: float, unit: str = "", **bar: float) -> None:
        """Shown at once: a run takes minutes."""
        row = Row(what, value, unit, **bar)
        self.rows.append(row)
        verdict = {None: "", True: "met", False: "MISSED"}[row.is_met]
        print(f"  {what:<74} {value:10.4g} {unit:<5} {row.bar:<9} {verdict}", flush=True)

    def write(self, path: Path = RESULTS) -> None:
        record = {
            "commit": _commit(),
            "date": time.strftime("%Y-%m-%d"),
            "quick": self.quick,
            "load_at_start": round(self.load, 2),
            "machine": f"{_processor()}, {os.cpu_count()} cores",
            "seconds": round(time.perf_counter() - self.began_at),
            "rows": [{**asdict(row), "is_met": row.is_met} for row in self.rows],
        }
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(record, indent=2) + "\n")


def _commit() -> str:
    run = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return run.stdout.strip() or "unknown"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
