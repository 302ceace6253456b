"""The table of docs/performance.md, written from the last full run's JSON.

python benchmarks/trainer/page.py      after a change of the page's form; a full run does it itself
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
RESULTS = REPOSITORY / "benchmarks" / "results" / "trainer.json"
PAGE = REPOSITORY / "docs" / "performance.md"
BEGIN, END = "<!-- trainer:begin -->\n", "<!-- trainer:end -->\n"


def update() -> None:
    head, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, tail = rest.partition(END)
    PAGE.write_text(head + BEGIN + table(results()) + END + tail)


def written() -> str:
    """What the page has now."""
    return PAGE.read_text().partition(BEGIN)[2].partition(END)[0]


def results(path: Path = RESULTS) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.is_file() else None


def table(found: dict[str, Any] | None) -> str:
    if found is None:
        return "No full run is committed yet.\n"
    machine = found["hardware"]
    lines = [
        f"{found['date']}, commit {found['commit']}: {machine['processor']}, {machine['cores']} cores, "
        f"{machine['memory_gib']} GiB, {machine['vector_width']}, accelerator: {machine['accelerator']}, "
        f"torch {machine['torch']}, one thread; load {found['load_at_start']} at the start.",
        "",
        "| what | figure | bar | |",
        "|---|---|---|---|",
        *(_bar_line(bar) for bar in found["bars"]),
        "",
        "| model | rows | what | ms | tokens/s | of GEMM |",
        "|---|---|---|---|---|---|",
        *(_row_line(row) for row in found["rows"]),
        "",
        "| beside | |",
        "|---|---|",
        *(f"| {name} | {value:.2f} |" for name, value in found["notes"].items()),
    ]
    return "\n".join(lines) + "\n"


def _bar_line(bar: dict[str, Any]) -> str:
    wanted = f"≥ {bar['at_least']:g}" if bar["at_least"] is not None else f"≤ {bar['at_most']:g}"
    return f"| {bar['what']} | {bar['value']:.2f} | {wanted} | {bar['verdict']} |"


def _row_line(row: dict[str, Any]) -> str:
    rate = f"{row['tokens'] / row['seconds']:.0f}" if row["tokens"] else ""
    share = f"{row['gemm_share']:.2f}" if row["gemm_share"] is not None else ""
    cells = (row["model"], row["shape"], row["what"].strip(), f"{1000 * row['seconds']:.1f}")
    return f"| {' | '.join((*cells, rate, share))} |"


if __name__ == "__main__":
    update()
