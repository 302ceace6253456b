"""The seam between a replica and whatever generates tokens: `InferenceEngine`.

An engine takes token ids and gives token ids; text, templates and HTTP stay in the replica. It runs in
threads or processes of its own: every method may be called from any thread and returns at once unless
it says that it blocks. What happens to a generation is told to its listener in `Update`s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from homefire.wire.completions import FinishReason
from homefire.wire.errors import HomefireError
from homefire.wire.ids import BASE_IDENTITY, Identity
from homefire.wire.internal import CanaryVerdict
from homefire.wire.manifest import Canary, CheckpointKind, LoraManifest
from homefire.wire.tensors import RawTensor

Alternatives = list[tuple[int, float]]
"""(token id, raw logprob) of one position's likeliest tokens, likeliest first."""


class StopCondition(Protocol):
    """Decides, token by token, where one sequence ends. Owned by the engine once submitted."""

    def push(self, token: int) -> bool:
        """True when the sequence ends with this token. Called once per token, in the engine's
        thread; must be quick."""
        ...


@dataclass(frozen=True, slots=True)
class Sampling:
    """The distribution that tokens are drawn from.

    Applied in this order: logit_bias, repetition, frequency and presence penalty (see adjustments.py),
    temperature, top_k, top_p (over what top_k left), min_p.
    """

    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    """Keeps the fewest likeliest tokens whose probabilities reach this sum."""
    top_k: int = 0
    """Keeps that many tokens; 0 keeps all."""
    min_p: float = 0.0
    """Keeps tokens at least this fraction as likely as the likeliest."""
    presence_penalty: float = 0.0
    """Taken from the logit of a token that was drawn."""
    frequency_penalty: float = 0.0
    """The same, for each time that it was."""
    repetition_penalty: float = 1.0
    """Divides a positive logit and multiplies a negative one, of a token drawn or in the prompt."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token, what is added to its logit), each token once."""

    @property
    def adjusts(self) -> bool:
        return bool(
            self.presence_penalty
            or self.frequency_penalty
            or self.repetition_penalty != 1
            or self.logit_bias
        )

    @property
    def truncates(self) -> bool:
        return self.top_p < 1.0 or self.top_k > 0 or self.min_p > 0.0


@dataclass(frozen=True, slots=True)
class PromptDraws:
    """Independent draws, with replacement, from the model's distribution at a temperature."""

    count: int
    """Per position."""
    temperature: float
    seed: int


@dataclass(frozen=True, slots=True)
class PromptScoring:
    """What is wanted of the prompt's own positions. Position 0 has no context, so it never has any."""

    logprobs_from: int | None = None
    """Position from which on logprobs of the prompt's tokens are wanted; None: of none."""
    num_alternatives: int = 0
    """Likeliest tokens, at the same positions."""
    targets: tuple[tuple[int, ...], ...] = ()
    """Ids to score: row i at position i + 1; -1 asks for nothing. Empty, or one row per position."""
    draws: PromptDraws | None = None
    """At every position after the first."""


@dataclass(frozen=True, slots=True)
class SequenceRequest:
    """One sequence to continue.

    The same `seed`, prompt, parameters and weights draw with the same random numbers in any batch. The
    tokens are then the same too, unless a number falls within float noise (about 1e-6) of the border
    between two tokens: a row's logits depend on the batch it is computed in, in their last bits.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    """0 generates nothing: for scoring the prompt."""
    sampling: Sampling = Sampling()
    seed: int | None = None
    stop_token_ids: frozenset[int] = frozenset()
    stop: StopCondition | None = None
    num_alternatives: int = 0
    """Likeliest tokens, at the sampled positions."""
    scoring: PromptScoring | None = None


@dataclass(frozen=True, slots=True)
class ServedWeights:
    """What a sequence is computed with. Equal ones are the same weights: the digest says so."""

    identity: Identity | None
    """None is the base model."""
    digest: str

    @property
    def name(self) -> Identity:
        return self.identity if self.identity is not None else BASE_IDENTITY


@dataclass(frozen=True)
class WeightSet:
    """Weights that an engine can serve: the base model, a full snapshot, or an adapter on the base."""

    served: ServedWeights
    kind: CheckpointKind
    tensors: Mapping[str, RawTensor] = field(repr=False)
    lora: LoraManifest | None = None
    canary: Canary | None = None

    @property
    def size_bytes(self) -> int:
        return sum(tensor.data.nbytes for tensor in self.tensors.values())


@dataclass(frozen=True, slots=True)
class Started:
    """The first update, once per generation; it comes together with the first tokens. Its weights are
    those of all tokens, unless `Sampled` says otherwise after a swap in place."""

    weights: ServedWeights
    prefill_queue_s: float
    """From arrival to the start of prefill, without the time below."""
    weight_swap_wait_s: float
    """Of that time, what the sequence waited because weights were being swapped."""
    num_running: int
    """Sequences running together, this generation's first ones included."""


@dataclass(frozen=True, slots=True)
class Prefilled:
    """The prompt of sequence `index` is in the cache."""

    index: int
    at: float
    """Clock.monotonic() when its first token was there."""
    num_cached_tokens: int
    logprobs: list[float]
    """Of prompt tokens `logprobs_from`, …; the first token of a prompt has none and counts 0."""
    alternatives: list[Alternatives]
    target_logprobs: list[list[float]] = field(default_factory=list)
    """As the targets; 0 where nothing was asked."""
    draws: list[Alternatives] = field(default_factory=list)
    """Per position after the first, in the order drawn."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """New tokens of sequence `index`; its last update when `finish` is set."""

    index: int
    tokens: list[int]
    logprobs: list[float]
    """Raw: of the model's own distribution."""
    sampling_logprobs: list[float]
    """Of the distribution that was sampled."""
    alternatives: list[Alternatives]
    """One per token when they were asked for, else empty."""
    finish: FinishReason | None
    weights: ServedWeights
    """That drew these tokens: of two versions come in two updates."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The generation ended without a result; its last update."""

    error: HomefireError


Update = Started | Prefilled | Sampled | Failed


class Listener(Protocol):
    def receive(self, update: Update) -> None: ...


Deliveries = Sequence[tuple[Listener, Update]]
Publish = Callable[[Deliveries], None]
"""Called in an engine's thread, at most once per step, with all that happened in it."""


class Ticket:
    """A submitted generation, for `cancel`. What else it is belongs to the engine."""


@dataclass(frozen=True, slots=True)
class Load:
    running: int
    """Sequences."""
    queued: int
    """Generations of which no sequence runs yet."""
    queued_tokens: int = 0
    """Of their prompts; one that several sequences share counts once."""


@dataclass(frozen=True, slots=True)
class Swapped:
    drain_ms: float
    apply_ms: float
    """Verification included."""
    canary: CanaryVerdict = CanaryVerdict.ABSENT
    num_stragglers: int = 0
    """Sequences that had begun under the old weights and go on under the new ones."""


class Stragglers(StrEnum):
    """What becomes of sequences that still run when a drain is out of time."""

    FAIL_SWAP = "fail_swap"
    """They run on, and the old weights serve on."""
    GO_ON = "go_on"
    """They go on in place under the new weights, over what is cached of them; each token names its own."""


class InferenceEngine(Protocol):
    """Serves one set of full weights at a time, and any number of adapters on the base model beside it:
    a running batch mixes rows of all of them. Adapters rest while other weights than the base serve.
    """

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_context_length(self) -> int: ...

    @property
    def attested_by(self) -> str:
        """What stands behind the digest of what serves: `memory` when it is taken of the weights in place,
        else e.g. `loaded_bytes+canary`."""
        ...

    def submit(
        self,
        sequences: Sequence[SequenceRequest],
        listener: Listener,
        *,
        weights: ServedWeights | None = None,
    ) -> Ticket:
        """One generation of one or more sequences, all under the same weights.

        `weights`: these and no others, an adapter that is held or the full weights that serve; the
        generation fails with WeightsMismatch when they cannot be had at its admission. None: the full
        weights that serve then.
        Raises Overloaded when too many wait, Unavailable when the engine is closed or broken.
        """
        ...

    def cancel(self, ticket: Ticket) -> None:
        """Frees the generation's slots within a step; no update follows. One that has ended is fine."""
        ...

    def swap_weights(
        self,
        weights: WeightSet,
        *,
        drain_timeout_s: float,
        stragglers: Stragglers = Stragglers.FAIL_SWAP,
        reset_prompt_cache: bool = True,
    ) -> Future[Swapped]:
        """Drains, swaps between two steps, and verifies digest and canary of what is then in memory.

        Generations that run finish on the old weights, as far as the drain has time; the others wait for
        the new ones. Those that were submitted with `weights` of their own never go on under others: they
        fail with WeightsMismatch instead. Prompts cached under the old weights serve these alone, should
        they come back, unless `reset_prompt_cache` frees them now.

        The future raises HotLoadFailed when the drain is out of time and nothing may go on, DigestMismatch,
        CanaryMismatch or InvalidArgument when the weights are not what they should be: then the old ones
        serve on, untouched or restored.
        """
        ...

    def hold_adapter(self, adapter: ServedWeights) -> bool:
        """Keeps a resident adapter from being evicted, until as many releases; False: it is not here."""
        ...

    def load_adapter(self, weights: WeightSet) -> Future[None]:
        """Makes an adapter resident and holds it once. Evicts the longest idle ones, and waits while
        all are held. The future raises DigestMismatch when what is then in memory has another digest,
        InvalidArgument when it does not fit the base model or the memory for adapters.
        """
        ...

    def release_adapter(self, adapter: ServedWeights) -> None:
        """Undoes one hold."""
        ...

    def base_weights(self) -> WeightSet:
        """The base model's weights, to go back to them. Blocks on disk."""
        ...

    def serving(self) -> ServedWeights: ...

    def serving_set(self) -> WeightSet: ...

    def load(self) -> Load: ...

    @property
    def failure(self) -> str:
        """Why nothing is served any more, e.g. weights lost in a swap; empty while all is well."""
        ...

    def close(self) -> None:
        """Fails what is left and stops. Blocks for the current step."""
        ...
