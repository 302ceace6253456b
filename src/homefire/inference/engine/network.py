"""What continuous batching needs of a network: prompts in, one token per running sequence out.

Two implementations: `EmbeddedNetwork` (torch) and `BigramNetwork` (numpy, for tests). A network keeps the
state of running sequences in slots 0 … B-1, packed at the front, and is used by one thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from homefire.inference.engine.protocol import Alternatives, WeightSet
from homefire.inference.engine.sampling_plan import Draws, SamplingPlan, Uniforms


@dataclass(frozen=True, slots=True)
class PrefillRow:
    """A prompt, computed once for all sequences that begin with exactly it."""

    tokens: tuple[int, ...]
    slots: tuple[int, ...]
    score_from: int | None
    num_alternatives: int
    """For the scored positions of the prompt."""


@dataclass(frozen=True, slots=True)
class PromptScore:
    """Of positions `score_from` … of a prompt. Empty when nothing was to be scored."""

    logprobs: list[float]
    alternatives: list[Alternatives]


@dataclass(frozen=True, slots=True)
class PrefillResult:
    draws: Draws
    """One token per slot, the slots in ascending order."""
    scores: list[PromptScore]
    """One per row."""


class Network(Protocol):
    @property
    def vocab_size(self) -> int: ...

    @property
    def max_context_length(self) -> int: ...

    def prefill(
        self, rows: Sequence[PrefillRow], plan: SamplingPlan, uniforms: Uniforms
    ) -> PrefillResult:
        """The rows' slots follow the running ones without a gap; `plan` is for these slots."""
        ...

    def decode(self, tokens: Sequence[int], plan: SamplingPlan, uniforms: Uniforms) -> Draws:
        """Appends `tokens[i]` to slot i and draws what follows it."""
        ...

    def move(self, *, source: int, destination: int) -> None:
        """The sequence of slot `source` goes on in slot `destination`, whose own has ended."""
        ...

    def install(self, weights: WeightSet) -> str:
        """Replaces the weights; returns the digest of what is then in memory.

        Checks names, shapes and dtypes before it changes anything: InvalidArgument. Nothing runs.
        """
        ...

    def base_weights(self) -> WeightSet:
        """The base model again, from disk. May run beside the network's own thread."""
        ...
