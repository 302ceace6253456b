"""What continuous batching needs of a network: prompts in, one token per running sequence out.

Two implementations: `EmbeddedNetwork` (torch) and `BigramNetwork` (numpy, for tests). A network keeps the
state of running sequences in slots 0 … B-1, packed at the front, and is used by one thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from homefire.inference.engine.protocol import (
    Alternatives,
    PromptScoring,
    ServedWeights,
    WeightSet,
)
from homefire.inference.engine.sampling_plan import Draws, SamplingPlan, Uniforms

Adapter = ServedWeights | None
"""Which resident adapter a row is computed with; None: the installed weights as they are."""


@dataclass(frozen=True, slots=True)
class PrefillRow:
    """A prompt, or its beginning, computed once for all sequences that begin with exactly it."""

    tokens: tuple[int, ...]
    slots: tuple[int, ...]
    """None for a beginning whose rest is computed in a later pass, or for a text that is only scored."""
    adapter: Adapter = None
    scoring: PromptScoring | None = None
    start: int = 0
    """Tokens that are not computed, since they lie in `held`. At least the last token is."""
    held: tuple[int, ...] = ()
    """Blocks of the first tokens, under the same weights."""
    kept: tuple[int, ...] = ()
    """Blocks to fill with the tokens after those of `held`."""

    @property
    def num_computed(self) -> int:
        return len(self.tokens) - self.start


@dataclass(frozen=True, slots=True)
class PromptScore:
    """What `PromptScoring` asked for, as `Prefilled` has it. Empty when nothing was to be scored."""

    logprobs: list[float] = field(default_factory=list)
    alternatives: list[Alternatives] = field(default_factory=list)
    target_logprobs: list[list[float]] = field(default_factory=list)
    draws: list[Alternatives] = field(default_factory=list)


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

    @property
    def compute_dtype(self) -> str:
        """What a pass is computed in, e.g. `float32`."""
        ...

    @property
    def block_tokens(self) -> int:
        """Tokens of one block of what it keeps beside its slots."""
        ...

    @property
    def num_blocks(self) -> int:
        """0 when it keeps nothing."""
        ...

    def prefill(
        self, rows: Sequence[PrefillRow], plan: SamplingPlan, uniforms: Uniforms
    ) -> PrefillResult:
        """Blocks are filled before the call returns. The rows' slots follow the running ones without a gap;
        `plan` is for these slots. Rows of one adapter stand together. A row without slots may be scored."""
        ...

    def decode(
        self,
        tokens: Sequence[int],
        plan: SamplingPlan,
        uniforms: Uniforms,
        adapters: Sequence[Adapter],
    ) -> Draws:
        """Appends `tokens[i]` to slot i and draws what follows it, with the slot's adapter."""
        ...

    def keep(self, slot: int, *, first: int, blocks: Sequence[int]) -> None:
        """Copies the slot's tokens from the `first` block on into blocks."""
        ...

    def move(self, *, source: int, destination: int) -> None:
        """The sequence of slot `source` goes on in slot `destination`, whose own has ended."""
        ...

    def install(self, weights: WeightSet) -> str:
        """Replaces the weights, between two steps; returns the digest of what is then in memory.

        Checks names, shapes and dtypes before it changes anything: InvalidArgument. DigestMismatch when
        something that is kept beside the weights is not made from them.
        """
        ...

    def add_adapter(self, weights: WeightSet) -> str:
        """Makes an adapter resident beside the weights; returns the digest of what is then in memory.

        InvalidArgument when it does not fit the base model; nothing changed then.
        """
        ...

    def drop_adapter(self, adapter: ServedWeights) -> None:
        """No row uses it."""
        ...

    def base_weights(self) -> WeightSet:
        """The base model again, from disk. May run beside the network's own thread."""
        ...
