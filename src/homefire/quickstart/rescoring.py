"""The held-out score again, for `homefire eval rerun`: what the evaluations of a run name as their scorer."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from homefire.quickstart import rollouts
from homefire.quickstart.task import held_out_prompts
from homefire.sdk import SampledCompletion


def score(completions: Sequence[SampledCompletion]) -> dict[str, float]:
    """One completion for each held-out prompt, in order. ValueError when they are another number."""
    pairs = zip(held_out_prompts(), completions, strict=True)
    return {"reward": fmean([rollouts.score(prompt, answer) for prompt, answer in pairs])}
