"""What the run prints and leaves behind when it is done."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import median

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from homefire.quickstart.plot import save_reward_plot
from homefire.quickstart.records import Results, Snapshot

PLOT_FILE = "reward.png"
_DIGEST_SHOWN = 8


def report(results: Results, folder: Path, console: Console) -> None:
    """The table, the figures, where everything lies, and the headline as the last line."""
    console.print(lifecycle_table(results))
    for line in [*figures(results), _plot_line(results, folder / PLOT_FILE)]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    files = f"metrics.jsonl, evaluations.jsonl and held_out.json are in {folder}"
    console.print(files, highlight=False, markup=False, soft_wrap=True)
    console.print(results.headline, highlight=False, markup=False, soft_wrap=True)


def lifecycle_table(results: Results) -> Table:
    """One row per set of weights that was served, in order; fits 80 columns."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("step", "snapshot", "kind", "bytes", "reward", "held out"):
        is_text = name in ("snapshot", "kind")
        table.add_column(name, justify="left" if is_text else "right", no_wrap=True)
    table.add_column("served weights, digest", no_wrap=True)
    held_out = {e.snapshot.identity: e.reward for e in (results.before, results.after)}
    for record in results.steps:
        table.add_row(*_row(str(record.step), record.snapshot, record.reward, held_out))
    table.add_row(*_row("", results.after.snapshot, None, held_out))
    return table


def figures(results: Results) -> list[str]:
    """Sizes and times in plain sentences."""
    deltas = [s.size_bytes for s in _snapshots(results) if s.kind == "delta"]
    base = results.before.snapshot.size_bytes
    steps = results.steps
    gap = max(record.logprob_gap for record in steps)
    phases = {
        "sync": [record.sync_s for record in steps],
        "sample": [record.sample_s for record in steps],
        "train": [record.train_s for record in steps],
    }
    times = ", ".join(f"{name} {median(seconds):.2f} s" for name, seconds in phases.items())
    return [
        f"base {base:,} bytes; {len(deltas)} deltas, median {int(median(deltas or [0])):,} bytes",
        f"an RL step (median): {times}; {steps[0].num_completions} completions each",
        f"trainer and sampler logprobs differ by at most {gap:.2g} under the same weights",
        f"branched job {results.branch.branch_job} went on from {results.branch.state!r}: "
        f"{results.branch.num_logprobs} logprobs equal bit for bit after the load and a step later",
    ]


def _row(
    step: str, snapshot: Snapshot, reward: float | None, held_out: Mapping[str, float]
) -> list[str]:
    evaluated = held_out.get(snapshot.identity)
    return [
        step,
        snapshot.identity.rpartition("-")[0],
        snapshot.kind,
        str(snapshot.size_bytes),
        "" if reward is None else f"{reward:.3f}",
        "" if evaluated is None else f"{evaluated:.3f}",
        f"{snapshot.identity} {snapshot.digest[:_DIGEST_SHOWN]}",
    ]


def _snapshots(results: Results) -> list[Snapshot]:
    return [*(record.snapshot for record in results.steps), results.after.snapshot]


def _plot_line(results: Results, file: Path) -> str:
    try:
        save_reward_plot(results, file)
    except ImportError:
        return "no reward plot: matplotlib is missing (pip install 'homefire[plot]')"
    return f"reward plot: {file}"
