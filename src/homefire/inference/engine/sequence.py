"""A generation and its sequences while the engine works on them."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

from homefire.inference.engine.adjustments import AdjustedTokens
from homefire.inference.engine.protocol import (
    Alternatives,
    Listener,
    Prefilled,
    Sampled,
    SequenceRequest,
    ServedWeights,
    Started,
    Ticket,
    Update,
)
from homefire.inference.engine.sampling_plan import Draws
from homefire.wire.completions import FinishReason


@dataclass(eq=False)
class Generation(Ticket):
    """Sequences submitted together: one set of weights for all of them."""

    listener: Listener
    arrived_at: float
    num_prompt_tokens: int = 0
    """Of all its different prompts."""
    wanted: ServedWeights | None = None
    """These weights and no others; None: those that serve at admission."""
    weights: ServedWeights | None = None
    """Set when the first sequence is admitted; a swap in place changes them."""
    adapter: ServedWeights | None = None
    """The same, when they are an adapter's."""
    started: Started | None = None
    """Not told yet."""
    has_ended: bool = False
    """Cancelled or failed: what of it still waits is skipped."""

    def carry_over(self, weights: ServedWeights) -> None:
        """Goes on under other weights; what was drawn before has been told."""
        self.weights = weights
        if self.started is not None:
            self.started = replace(self.started, weights=weights)


@dataclass(eq=False)
class Sequence:
    """One row of the running batch, or waiting to become one."""

    generation: Generation
    index: int
    """Within its generation."""
    request: SequenceRequest
    random: random.Random
    """Its own when seeded, else the scheduler's."""
    finish: FinishReason | None = None
    delivered_at: float = 0.0
    """When its listener was last told something; at first, when it was admitted."""
    prefilled: Prefilled | None = None
    """Not told yet."""
    is_mixed: bool = False
    """What is cached of it was computed under more than one version of the weights."""
    generated: list[int] = field(default_factory=list)
    adjusted: AdjustedTokens | None = field(init=False)
    _tokens: list[int] = field(default_factory=list)
    _logprobs: list[float] = field(default_factory=list)
    _sampling_logprobs: list[float] = field(default_factory=list)
    _alternatives: list[Alternatives] = field(default_factory=list)

    def __post_init__(self) -> None:
        sampling = self.request.sampling
        tokens = AdjustedTokens(sampling, self.request.prompt) if sampling.adjusts else None
        self.adjusted = tokens

    @property
    def last_token(self) -> int:
        return self.generated[-1]

    def accept(self, draws: Draws, row: int) -> None:
        """Takes the token drawn for it in this step, and decides whether it was the last."""
        token = draws.tokens[row]
        self.generated.append(token)
        if self.adjusted is not None:
            self.adjusted.draw(token)
        self._tokens.append(token)
        self._logprobs.append(draws.logprobs[row])
        self._sampling_logprobs.append(draws.sampling_logprobs[row])
        if self.request.num_alternatives:
            self._alternatives.append(draws.alternatives[row][: self.request.num_alternatives])
        self.finish = self._decide(token)

    def take(self, now: float) -> list[Update]:
        """All that its listener has not been told."""
        generation = self.generation
        news = [generation.started, self.prefilled, self._take_sampled()]
        generation.started = self.prefilled = None
        self.delivered_at = now
        return [update for update in news if update is not None]

    def _take_sampled(self) -> Sampled | None:
        weights = self.generation.weights
        if weights is None or not (self._tokens or self.finish):
            return None
        update = Sampled(
            index=self.index,
            tokens=self._tokens,
            logprobs=self._logprobs,
            sampling_logprobs=self._sampling_logprobs,
            alternatives=self._alternatives,
            finish=self.finish,
            weights=weights,
        )
        self._tokens, self._logprobs, self._sampling_logprobs, self._alternatives = [], [], [], []
        return update

    def _decide(self, token: int) -> FinishReason | None:
        request = self.request
        if token in request.stop_token_ids or (request.stop and request.stop.push(token)):
            return FinishReason.STOP
        return FinishReason.LENGTH if len(self.generated) >= request.max_new_tokens else None
