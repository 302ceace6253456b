"""The numeric half of an engine: a model, and the weights of each slot on it.

Two implementations: torch (`torch_engine.py`) and numpy (`fake.py`). Everything that has no numbers in
it (slots, plans, losses, snapshots, recovery) is shared above this seam.

Axes: T tokens of all rows, N rows, K targets per token, E width of the last layer's states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from homefire.wire.engine import AdamParams, GradNormMetrics, LoraSpec
from homefire.wire.errors import InvalidArgument
from homefire.wire.pass_extras import Pooling
from homefire.wire.specs import PassBudget
from homefire.wire.tensors import RawTensor, Tensors

Ints = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]
GradientOf = Callable[[Float32], Float32]
"""Logprobs [T, K] -> the derivative of the loss with respect to them, [T, K]."""

SpanGradientOf = Callable[[Float32, slice], Float32]
"""The same for the tokens in a slice of the micro-batch: both arrays are the slice's."""


@dataclass(frozen=True)
class PackedTokens:
    """One micro-batch: rows end to end."""

    tokens: Ints
    """[T]"""
    lengths: list[int]
    """[N], sum T"""
    shares: Sequence[int] = field(default=(), kw_only=True)
    """Rows of each rank, neighbours in the order of the ranks; empty: one rank has them all."""
    recompute: int = field(default=0, kw_only=True)
    """So many decoder layers, from the first, compute their activations again in backward."""


@dataclass(frozen=True)
class PackedTargets(PackedTokens):
    """The same, and what each token should predict."""

    targets: Ints
    """[T, K]"""


@dataclass(frozen=True)
class WeightFiles:
    """A slot's numbers as raw tensors, bit for bit. Views of live memory: write them before moving on."""

    masters: Tensors
    """What the optimizer updates, float32."""
    optimizer: Tensors
    """First and second moments (`first:<name>`, `second:<name>`), and `updates` int64 [1]."""
    gradient: Tensors = field(default_factory=dict[str, RawTensor])
    """The accumulated gradient; empty when there is none."""


@dataclass(frozen=True)
class MergedWeights:
    """A base model with an adapter folded in: fresh tensors in the serving dtype."""

    tensors: dict[str, RawTensor]
    config_changes: dict[str, Any] = field(default_factory=dict[str, Any])
    """Fields of config.json that must differ from the base model's."""


class PassGraph(Protocol):
    """Logprobs of a micro-batch, and what their backward needs."""

    @property
    def logprobs(self) -> Float32:
        """[T, K]; not to be asked for after `release`."""
        ...

    @property
    def size_bytes(self) -> int:
        """What is kept for the backward, beside the weights; 0 once released."""
        ...

    @property
    def is_intact(self) -> bool:
        """False once released, or once the weights that it was computed with have moved out."""
        ...

    def backward(self, gradient: Float32) -> None:
        """Adds d loss / d weights to the gradient aside, given d loss / d logprobs [T, K]. Once."""
        ...

    def release(self) -> None:
        """Gives the memory back."""
        ...


class FrozenWeights(Protocol):
    """Numbers that rows can be scored with."""

    def logprobs(self, batch: PackedTargets) -> Float32:
        """[T, K], under the serving weights. No gradient."""
        ...

    def likeliest(self, batch: PackedTokens, count: int) -> tuple[Float32, Ints]:
        """The logprobs and ids of the likeliest next tokens, both [T, count], likeliest first."""
        ...

    def embeddings(self, batch: PackedTokens, pooling: Pooling) -> Float32:
        """[N, E]: the last layer's states, pooled over each row. No gradient."""
        ...

    def serving(self) -> dict[str, RawTensor]:
        """Fresh tensors of a sampler snapshot: the whole model's, or the adapter's."""
        ...


class TrainableWeights(FrozenWeights, Protocol):
    """The weights of one slot with their optimizer and accumulated gradient.

    A gradient is accumulated per operation: `backward` adds to a gradient aside, which
    `keep_gradient` merges and `drop_gradient` forgets, so that a failed operation leaves no trace.
    """

    @property
    def num_trainable(self) -> int: ...

    def backward(self, batch: PackedTargets, gradient_of: GradientOf) -> Float32:
        """Logprobs as `logprobs` gives them; adds d loss / d weights to the gradient aside.

        Errors of `gradient_of` pass through.
        """
        ...

    def graph(self, batch: PackedTargets) -> PassGraph:
        """The forward half of a backward whose gradient comes later: the same bits in the end as
        when both follow at once, here or in another process."""
        ...

    def fused_backward(self, batch: PackedTargets, gradient_of: SpanGradientOf) -> Float32:
        """`backward`, bit for bit, of a loss whose derivative at a token depends on that token alone:
        it is asked for in pieces, so that no logits are computed twice.
        """
        ...

    def embedding_backward(
        self, batch: PackedTokens, pooling: Pooling, gradient: Float32
    ) -> Float32:
        """Embeddings as `embeddings` gives them; adds d loss / d weights to the gradient aside.

        `gradient` [N, E] is d loss / d embeddings.
        """
        ...

    def keep_gradient(self) -> None:
        """Merges the gradient aside into the accumulated one."""
        ...

    def drop_gradient(self) -> None:
        """Forgets the gradient aside."""
        ...

    def clear_gradient(self) -> None:
        """Forgets the accumulated gradient."""
        ...

    def step(
        self, adam: AdamParams, divisor: float, norm_metrics: GradNormMetrics
    ) -> dict[str, float]:
        """AdamW with the accumulated gradient / divisor (zero when there is none).

        Metrics: `grad_norm` (before clipping), `update_norm`, and for whole models
        `changed_fraction` (elements whose serving value moved); what `norm_metrics` adds is in
        `gradient_norms.py`. Raises NonFiniteGradient, naming the parameter, before anything is
        stepped.
        """
        ...

    def adapter_config(self) -> dict[str, Any] | None:
        """`adapter_config.json` of an adapter; None when `serving` is a whole model."""
        ...

    def merged(self) -> MergedWeights:
        """The base model with the adapter folded in; `nothing_to_merge` where there is none."""
        ...

    def files(self) -> WeightFiles: ...

    def check_fits(self, masters: Tensors) -> None:
        """InvalidArgument, naming the first tensor that `masters` lacks or shapes otherwise."""
        ...

    def restore(self, masters: Tensors, optimizer: Tensors | None, gradient: Tensors) -> None:
        """Takes over copies, bit for bit; None starts a fresh optimizer. Call `check_fits` first."""
        ...


@dataclass(frozen=True)
class Part:
    """What one slot contributes to a pass that several slots share."""

    weights: TrainableWeights
    batch: PackedTargets
    gradient_of: SpanGradientOf
    is_per_token: bool
    """`gradient_of` may be asked for some tokens at a time; else for all of them at once."""


class Network(Protocol):
    """A loaded base model on which slots are opened."""

    @property
    def architecture(self) -> str: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_context_length(self) -> int: ...

    @property
    def num_parameters(self) -> int: ...

    @property
    def num_layers(self) -> int:
        """Whose activations can be computed again in backward; 0 where there is nothing to save."""
        ...

    @property
    def memory_bytes(self) -> int:
        """Of the device in all."""
        ...

    @property
    def num_ranks(self) -> int:
        """That the rows of a pass are divided among."""
        ...

    @property
    def compute_dtype(self) -> str:
        """What a pass is computed in, e.g. `float32`."""
        ...

    def pass_budget(self) -> PassBudget | None:
        """How a batch should be cut on this device; None where the job's spec says it."""
        ...

    def available_bytes(self) -> int | None:
        """What the device has free; None when unknown."""
        ...

    def free_memory(self) -> None:
        """Gives what is cached but not used back to the device, after a pass that found none."""
        ...

    def use_threads(self, count: int) -> None: ...

    def reference(self) -> FrozenWeights:
        """The base model itself, whatever is trained beside it."""
        ...

    def open_full(self) -> TrainableWeights:
        """All parameters, at the base model. Unsupported when it cannot be held beside what is open."""
        ...

    def open_lora(self, spec: LoraSpec) -> TrainableWeights:
        """A fresh adapter on the frozen base; `spec.seed` is set. Unsupported as above."""
        ...

    def shares_passes(self, weights: TrainableWeights) -> bool:
        """Whether a `Part` may have these weights."""
        ...

    def backward_together(self, parts: Sequence[Part]) -> list[Float32]:
        """One pass over the rows of several slots, in order: what `backward` does for each of them.

        The parts' weights differ, and share passes. Bits depend on which parts there are and on their
        shapes, never on the numbers in another part.
        """
        ...

    def close(self, weights: TrainableWeights) -> None: ...


def nothing_to_merge() -> InvalidArgument:
    return InvalidArgument(
        "checkpoint_type 'merged_base' folds an adapter into its base; this model trains all"
        " parameters",
        hint="use base or delta",
        field="checkpoint_type",
    )
