"""Window, completions in flight and queue time over time: one row of axes per load."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from loop import Run
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def save_plot(runs: Mapping[str, Run], file: Path) -> None:
    """`runs`: the adaptive run of each load, by the load's name."""
    figure = Figure(figsize=(9, 2.1 * len(runs)), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(runs), 2, squeeze=False)
    for (name, run), (left, right) in zip(runs.items(), axes, strict=True):
        for client in sorted(run.client_seconds):
            samples = [sample for sample in run.samples if sample.client == client]
            at_s = [sample.at_s for sample in samples]
            left.step(at_s, [sample.window for sample in samples], where="post", label="window")
            left.plot(at_s, [sample.in_flight for sample in samples], ",", label="in flight")
            right.plot(at_s, [sample.queue_s for sample in samples], ".", markersize=2)
        left.set(ylabel="completions", title=name, ylim=(0, None))
        right.axhline(0.5, color="grey", linestyle=":")
        right.set(ylabel="prefill queue (s)", ylim=(0, None))
    axes[0][0].legend(loc="lower right", frameon=False)
    for last in axes[-1]:
        last.set_xlabel("s")
    figure.savefig(file)
