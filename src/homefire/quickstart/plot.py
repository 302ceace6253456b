"""The reward plot, as an image."""

from __future__ import annotations

from pathlib import Path

from homefire.quickstart.records import Results


def save_reward_plot(results: Results, file: Path) -> None:
    """Reward of each step's rollouts, and the held-out reward before and after. ImportError without
    matplotlib (the extra `homefire[plot]`)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    steps = [record.step for record in results.steps]
    axes.plot(steps, [record.reward for record in results.steps], marker="o", label="rollouts")
    held_out = [results.before.reward, results.after.reward]
    axes.plot([0, len(steps)], held_out, "s", color="black", label="held out")
    axes.axvline(len(steps) // 2 - 0.5, color="grey", linestyle=":", label="client reconnected")
    axes.set(xlabel="RL step", ylabel="mean reward", ylim=(0, 1), title=results.headline)
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(file)
