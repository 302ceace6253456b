"""The page of figures has those of the last run, and no others."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

TRAINER = Path(__file__).parents[2] / "benchmarks" / "trainer"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"bench_{name}", TRAINER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


page, report = load("page"), load("report")


def test_the_trainers_table_is_that_of_the_committed_run() -> None:
    assert page.written() == page.table(page.results()), "run benchmarks/trainer/page.py"


def test_a_report_becomes_a_table_with_bars_and_verdicts(tmp_path: Path) -> None:
    found = report.Report()
    found.add(report.Row("small", "8x128", "full parameter", 0.5, tokens=1024, gemm_share=0.7))
    found.add(report.Bar("held / built in", 1.2, at_most=1.0, limited_by="the head"))
    found.write(tmp_path / "results" / "trainer.json", quick=False, load=0.5)
    table = page.table(page.results(tmp_path / "results" / "trainer.json"))
    assert "| small | 8x128 | full parameter | 500.0 | 2048 | 0.70 |" in table
    assert "| held / built in | 1.20 | ≤ 1 | missed by 20%: the head |" in table
