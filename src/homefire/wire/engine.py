"""Records between a trainer front and its engine, and the arrays that travel with them.

`engine_frames.py` says how they lie on the wire.

Legend of axes: N rows (datums), T tokens of all rows end to end, K targets per token.

Batch arrays (with `Forward` and `ForwardBackward`):
    tokens   int32 [T]      rows end to end
    lengths  int32 [N]      tokens per row, sum T
    target_tokens int64 [T, K];  weights float32 [T, K]               (cross_entropy)
    target_tokens int64 [T, 1];  logprobs, advantages, thresholds, … float32 [T]   (other losses)
    embedding_grads float32 [N, E]                 (backward of an embedding; no targets)
Reply arrays (`Rows`), in the order of the request: logprobs float32 [T, K]; with `top_k`
top_k_logprobs float32 and top_k_indices int64 [T, top_k]; or embedding float32 [N, E] alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import StrEnum
from typing import Any

import msgspec
import numpy.typing as npt

from homefire.wire.errors import ErrorRecord, InvalidArgument
from homefire.wire.graphs import GraphFate, GraphUse, HeldGraphs
from homefire.wire.specs import Accelerator, PassBudget

Array = npt.NDArray[Any]
Arrays = dict[str, Array]


MERGED_BASE = "merged_base"
"""The checkpoint type that folds an adapter into its base model."""


class SlotKind(StrEnum):
    """What a slot holds."""

    FULL = "full"
    """All parameters, with an optimizer."""
    LORA = "lora"
    """An adapter on the frozen base, with an optimizer."""
    REFERENCE = "reference"
    """The frozen base itself: forward passes only."""


class LoraInit(StrEnum):
    """How a fresh adapter's A begins; B is always zero. The values are the protocol's."""

    KAIMING = "kaiming"
    """Uniform in +-1 / sqrt(inputs), as PEFT does."""
    NORA = "nora"
    """The same, then each input's column has norm 1 over the rank."""


class LoraSpec(msgspec.Struct, frozen=True, kw_only=True):
    rank: int
    alpha: float = 32.0
    seed: int | None = None
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = True
    init: LoraInit = LoraInit.KAIMING


class ExecutionPlan(msgspec.Struct, frozen=True, kw_only=True):
    """How an operation is cut; journaled before it runs, because bits depend on it on CPU.

    Example: ExecutionPlan(micro_batches=[[0, 2], [1]], threads=1) for three rows.
    """

    micro_batches: list[list[int]]
    """Row indices of each micro-batch, in execution order."""
    threads: int
    """Of each rank."""
    graph: GraphUse = GraphUse.NONE
    shares: list[list[int]] = []
    """Per micro-batch, how many of its rows each rank computes, in their order. Empty: one rank.

    Example: [[2, 1], [1, 0]] for micro-batches of 3 and 1 rows on two ranks.
    """
    recompute: list[int] = []
    """Per micro-batch, how many decoder layers, from the first, compute their activations again in
    backward rather than keep them. Empty: none. The same bits on CPU; on an accelerator a matter of
    its kernels."""


class AdamParams(msgspec.Struct, frozen=True, kw_only=True):
    """Decoupled AdamW; the defaults are the protocol's (tinker.md §4.4)."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0
    """Global norm; 0 means no clipping."""


SMALLEST_EPS = 1e-37
"""Below it eps is 0 in float32, and a weight that never had a gradient would become 0 / 0."""


def check_adam(adam: AdamParams) -> None:
    """InvalidArgument, naming the first parameter that is out of its range."""
    ranges = {
        "learning_rate": (adam.learning_rate, 0.0, math.inf),
        "beta1": (adam.beta1, 0.0, 1.0),
        "beta2": (adam.beta2, 0.0, 1.0),
        "eps": (adam.eps, SMALLEST_EPS, math.inf),
        "weight_decay": (adam.weight_decay, 0.0, math.inf),
        "grad_clip_norm": (adam.grad_clip_norm, 0.0, math.inf),
    }
    for name, (value, low, below) in ranges.items():
        if not low <= value < below:
            raise InvalidArgument(
                f"adam_params.{name} is {value}",
                hint=f"use {low:g} <= {name} < {below:g}",
                field=name,
            )


class GradNormMetrics(StrEnum):
    """What a step tells about its gradient, beyond `grad_norm` and `update_norm`."""

    OFF = "off"
    BASIC = "basic"
    """Norms of the gradient after clipping and of the weights, the largest element."""
    DETAILED = "detailed"
    """The gradient's norm per parameter too."""


class GradNormalization(StrEnum):
    """What the accumulated gradient is divided by, before clipping."""

    NONE = "none"
    NUM_LOSS_TOKENS = "num_loss_tokens"
    """Tokens whose loss has a non-zero gradient."""
    NUM_SEQUENCES = "num_sequences"
    """Rows with such a token."""


def of_member(number: int, arrays: Arrays) -> Arrays:
    """One member's arrays of a packed request or reply."""
    prefix = f"{number}."
    return {
        name.removeprefix(prefix): array
        for name, array in arrays.items()
        if name.startswith(prefix)
    }


def by_member(arrays: Sequence[Arrays]) -> Arrays:
    """The arrays of all members, as a packed request or reply has them."""
    return {
        f"{number}.{name}": array
        for number, own in enumerate(arrays)
        for name, array in own.items()
    }


# Requests ------------------------------------------------------------------------------------


class OpenModel(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """First request. Loads the base model; everything later refers to it."""

    model_dir: str
    base_model: str
    store_root: str
    account: str
    job: str
    threads: int
    max_context_length: int
    serving_dtype: str = "bfloat16"
    accelerator: Accelerator = Accelerator.CPU
    snapshot_cap_bytes: int = 64 << 30
    held_graph_bytes: int | None = None
    """What kept graphs of all slots may take together; None: a share of the device's memory."""
    held_graph_limit_s: float = 300.0


class OpenSlot(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    slot: str
    kind: SlotKind
    lora: LoraSpec | None = None


class CloseSlot(msgspec.Struct, frozen=True, tag=True):
    slot: str


class Forward(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Logprobs of the targets, and what `pass_extras` asks for; no gradient, no state changes."""

    slot: str
    loss_fn: str
    loss_fn_config: dict[str, float | str]
    plan: ExecutionPlan


class ForwardBackward(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Adds the gradient of the summed loss to the slot's accumulated gradient."""

    slot: str
    loss_fn: str
    loss_fn_config: dict[str, float | str]
    plan: ExecutionPlan


class PackedForwardBackward(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """One ForwardBackward of each of several slots that share passes, together: the k-th micro-batches
    of all members are one pass, in the members' order. A member that fails changes nothing of its
    slot, and not a bit of the others.

    Arrays, of the request and the reply, are named after the member: `0.tokens`, `1.tokens`, …
    Answered by `RowsByMember`.
    """

    members: list[ForwardBackward]


class OptimStep(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Applies and clears the accumulated gradient. NaN or Inf is refused and nothing is stepped."""

    slot: str
    adam: AdamParams
    normalization: GradNormalization = GradNormalization.NONE
    norm_metrics: GradNormMetrics = GradNormMetrics.OFF


class DiscardGradients(msgspec.Struct, frozen=True, tag=True):
    slot: str


class SaveSampler(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Writes a sampler snapshot to the store and commits it.

    `base` and `delta` for full slots; a LoRA slot writes its adapter, or with `merged_base` a whole
    model with the adapter folded in, which is nobody's parent. A delta's parent is the slot's last committed snapshot; without one a base is written and the reply says so. Saving an
    existing identity again succeeds when the weights have the same digest, else DuplicateCheckpoint.
    """

    slot: str
    identity: str
    checkpoint_type: str
    metadata: dict[str, str] = {}
    ttl_seconds: int | None = None


class SaveExternal(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Writes the serving weights, to be taken elsewhere, under `external/<name>` in the store: a PEFT
    directory of a LoRA slot, a Hugging Face directory of a full one. No delta descends from it.

    The same weights again under their name succeed, others are DuplicateCheckpoint.
    """

    slot: str
    name: str
    metadata: dict[str, str] = {}
    ttl_seconds: int | None = None


class AdoptSnapshot(msgspec.Struct, frozen=True, tag=True):
    """Replay of a SaveSampler that is committed: check that the weights still have its digest and
    make it the parent of the next delta."""

    slot: str
    identity: str


class SaveState(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Masters, optimizer and step of a slot, under `state/<name>` in the store."""

    slot: str
    name: str
    overwrite: bool = False
    metadata: dict[str, str] = {}
    ttl_seconds: int | None = None


class LoadState(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """`directory` is a committed state of this or another job. Clears accumulated gradients."""

    slot: str
    directory: str
    with_optimizer: bool


class LoadAdapter(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Weights of a PEFT directory into a LoRA slot of the same rank, alpha and modules, with a fresh
    optimizer. Clears accumulated gradients; the step count stays."""

    slot: str
    directory: str
    digest: str
    """Of the tensors as they were when the request was accepted."""


class SaveRecovery(msgspec.Struct, frozen=True, tag=True):
    """All slots with optimizer, unapplied gradients and parents, to a new directory."""

    directory: str


class LoadRecovery(msgspec.Struct, frozen=True, tag=True):
    """Restores what SaveRecovery wrote, bit for bit; the slots are opened by it."""

    directory: str


class WeightsDigest(msgspec.Struct, frozen=True, tag=True):
    slot: str


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """The engine answers `Done` and exits with status 0."""


Request = (
    OpenModel
    | OpenSlot
    | CloseSlot
    | Forward
    | ForwardBackward
    | PackedForwardBackward
    | OptimStep
    | DiscardGradients
    | SaveSampler
    | SaveExternal
    | AdoptSnapshot
    | SaveState
    | LoadState
    | LoadAdapter
    | SaveRecovery
    | LoadRecovery
    | WeightsDigest
    | Shutdown
)

SaveRequest = SaveSampler | SaveExternal | SaveState | SaveRecovery
"""Those that are answered by `SaveBegun`, or at once where a copy would not fit into memory."""

# Replies -------------------------------------------------------------------------------------


class ModelOpened(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    architecture: str
    """`model_type` of the config, e.g. `qwen3`."""
    vocab_size: int
    max_context_length: int
    num_parameters: int
    pid: int
    held_graph_bytes: int = 0
    """The bound that holds."""
    pass_budget: PassBudget | None = None
    """By what is free on an accelerator now; None on a CPU, whose budget comes with the spec."""


class SlotOpened(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    slot: str
    kind: SlotKind
    num_trainable: int
    step: int
    lora: LoraSpec | None = None
    shares_passes: bool = False
    """It may be a member of a PackedForwardBackward."""


class Rows(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Arrays: see above. Metric keys carry their reduction, e.g. `loss:sum`."""

    metrics: dict[str, float]
    graph: GraphFate = GraphFate.FREED
    held: HeldGraphs | None = None
    """After this pass; a member of a pack does not say."""


class Stepped(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    step: int
    """Optimizer steps applied to this slot so far, this one included."""
    metrics: dict[str, float]
    """The same bits again when the step is replayed."""
    seconds: float = 0.0
    """What this step took; another each time."""


class GradientsDiscarded(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    num_backward_calls: int
    num_loss_tokens: int


class SamplerSaved(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    identity: str
    kind: str
    """base, delta or lora: what was written, which may differ from what was asked."""
    parent: str | None
    step: int
    size_bytes: int
    digest: str
    num_changed: int = 0
    num_elements: int = 0
    note: str = ""


class ExternalSaved(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    name: str
    kind: str
    """base or lora"""
    step: int
    size_bytes: int
    digest: str


class StateSaved(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    name: str
    step: int
    size_bytes: int
    digest: str


class StateLoaded(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    step: int
    digest: str


class RecoverySaved(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    size_bytes: int
    slots: list[SlotOpened]


class RecoveryLoaded(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    slots: list[SlotOpened]


class Digest(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    digest: str
    step: int


class Done(msgspec.Struct, frozen=True, tag=True):
    pass


class Failure(msgspec.Struct, frozen=True, tag=True):
    """The operation failed and changed nothing; the engine goes on."""

    error: ErrorRecord


class RowsByMember(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    members: list[Rows | Failure]


class SaveBegun(msgspec.Struct, frozen=True, tag=True):
    """The bytes to save are copied, so what follows may change the live ones. What became of the save
    follows, in the order in which saves began: `SaveFinished` with this ticket."""

    ticket: int


SaveReply = SamplerSaved | ExternalSaved | StateSaved | RecoverySaved | Failure


class SaveFinished(msgspec.Struct, frozen=True, tag=True):
    """Not an answer: it may come at any time, also before that to the next request."""

    ticket: int
    reply: SaveReply


Reply = (
    ModelOpened
    | SlotOpened
    | Rows
    | RowsByMember
    | Stepped
    | GradientsDiscarded
    | SamplerSaved
    | ExternalSaved
    | StateSaved
    | StateLoaded
    | RecoverySaved
    | RecoveryLoaded
    | Digest
    | Done
    | Failure
    | SaveBegun
    | SaveFinished
)
