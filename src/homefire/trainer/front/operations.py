"""What a client asked for, decoded and independent of the wire it came by: what the journal keeps.

Two requests are the same if their operations are: the digest is over the canonical encoding below.
What is kept of it, in the journal and in memory, is packed: compressed, where that pays.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

import msgspec
import zstandard

from homefire.wire.engine import (
    AdamParams,
    GradNormalization,
    GradNormMetrics,
    LoraSpec,
    SlotKind,
)
from homefire.wire.errors import ErrorRecord, HomefireError, InvalidArgument
from homefire.wire.optim_step import AdamFields, OptimStepRequest, adam_fields
from homefire.wire.tinker import Pass, RejectedPass

BASE_ONLY_KEY = "homefire.base_only"
OWN_PASSES_KEY = "homefire.own_passes"


class OperationKind(StrEnum):
    """Which call of the protocol a request was."""

    FORWARD = "forward"
    """Logprobs only."""
    FORWARD_BACKWARD = "forward_backward"
    """Adds to the accumulated gradient."""
    OPTIM_STEP = "optim_step"
    """Applies and clears the accumulated gradient."""
    SAVE_WEIGHTS = "save_weights"
    """Weights and optimizer, to go on from."""
    SAVE_WEIGHTS_FOR_SAMPLER = "save_weights_for_sampler"
    """A snapshot to serve."""
    SAVE_WEIGHTS_EXTERNAL = "save_weights_external"
    """Weights to be taken elsewhere."""
    LOAD_WEIGHTS = "load_weights"
    """Replaces the weights, and clears the accumulated gradient."""
    LOAD_ADAPTER = "load_adapter"
    """Replaces an adapter's weights, with a fresh optimizer."""
    CREATE_MODEL = "create_model"
    """A new handle on a slot."""
    UNLOAD_MODEL = "unload_model"
    """The handle is given up; a dedicated job keeps the weights, a pool closes their slot."""


class RunPass(msgspec.Struct, frozen=True, tag="pass"):
    """forward or forward_backward."""

    body: Pass


class StepOptimizer(msgspec.Struct, frozen=True, tag="step"):
    adam: AdamParams
    normalization: GradNormalization
    norm_metrics: GradNormMetrics = GradNormMetrics.OFF


class SaveTrainState(msgspec.Struct, frozen=True, kw_only=True, tag="save_state"):
    name: str | None
    """None: named after its seq."""
    overwrite: bool = False
    ttl_seconds: int | None = None
    metadata: dict[str, str] = {}


class SaveSnapshot(msgspec.Struct, frozen=True, kw_only=True, tag="save_sampler"):
    name: str
    checkpoint_type: str
    ttl_seconds: int | None = None
    metadata: dict[str, str] = {}
    sampling_session_id: str = ""
    """The session that samples it, of a save that was asked for without a path."""


class SaveExternalWeights(msgspec.Struct, frozen=True, kw_only=True, tag="save_external"):
    name: str
    ttl_seconds: int | None = None


class LoadTrainState(msgspec.Struct, frozen=True, tag="load_state"):
    path: str
    with_optimizer: bool


class LoadAdapterWeights(msgspec.Struct, frozen=True, tag="load_adapter"):
    """What the path led to when the request was accepted; replay loads the same or says so."""

    path: str
    directory: str
    digest: str


class CreateHandle(msgspec.Struct, frozen=True, kw_only=True, tag="create"):
    """A new handle on a slot, which is opened if it is not yet; with `load`, a state is loaded."""

    session_id: str
    model_seq_id: int
    slot: str
    kind: SlotKind
    lora: LoraSpec | None = None
    load: LoadTrainState | None = None
    base_model: str = ""
    """As the client named it."""
    metadata: dict[str, str] = {}

    @property
    def own_passes(self) -> bool:
        """No other model's passes are packed with those of this one."""
        return self.metadata.get(OWN_PASSES_KEY, "").lower() == "true"


class UnloadHandle(msgspec.Struct, frozen=True, tag="unload"):
    closes_slot: bool = False
    """The weights go too, since the slot was the model's own."""


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """Well-formed, but wrong before it is tried. It keeps its place in the order and fails there,
    since a refused POST would leave a hole in the sequence."""

    kind: OperationKind
    error: ErrorRecord


Operation = (
    RunPass
    | StepOptimizer
    | SaveTrainState
    | SaveSnapshot
    | SaveExternalWeights
    | LoadTrainState
    | LoadAdapterWeights
    | CreateHandle
    | UnloadHandle
    | Refused
)

SaveOperation = SaveTrainState | SaveSnapshot | SaveExternalWeights
"""Those that go on after their bytes are taken."""

_encoder = msgspec.msgpack.Encoder(order="deterministic")
_decoder: msgspec.msgpack.Decoder[Operation] = msgspec.msgpack.Decoder(Operation)


_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
"""No encoded operation begins with it: they are msgpack maps, and 0x28 is a number."""
_ZSTD_LEVEL = 1
"""A batch of text shrinks to a fifth, one with logprobs and advantages to a third, at 260 MB/s; what
does not shrink passes at 1,300 MB/s."""
_PACK_ABOVE = 512
"""Bytes."""
_PACKED_PAYS_BELOW = 0.9
"""Of the size it had: reading back random floats must not cost more than they saved."""
OFF_LOOP_ABOVE = 32_768
"""Bytes as packed."""


def encode(operation: Operation) -> bytes:
    return _encoder.encode(operation)


def pack(encoded: bytes) -> bytes:
    """As it is kept. Takes milliseconds per MB: not on the event loop, for large ones."""
    if len(encoded) <= _PACK_ABOVE:
        return encoded
    packed = zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compress(encoded)
    return packed if len(packed) < _PACKED_PAYS_BELOW * len(encoded) else encoded


def decode(data: bytes) -> Operation:
    """Of what was encoded, packed or not: journals of earlier versions are not."""
    is_packed = data.startswith(_ZSTD_MAGIC)
    return _decoder.decode(zstandard.ZstdDecompressor().decompress(data) if is_packed else data)


async def decode_off_loop(data: bytes) -> Operation:
    """The same, without holding up heartbeats."""
    if len(data) > OFF_LOOP_ABOVE:
        return await asyncio.to_thread(decode, data)
    return decode(data)


def digest_of(encoded: bytes) -> str:
    return hashlib.sha256(encoded).hexdigest()


def refuse(kind: OperationKind, error: HomefireError) -> Refused:
    return Refused(kind, ErrorRecord.of(error))


def kind_of(operation: Operation) -> OperationKind:
    match operation:
        case RunPass(body):
            return OperationKind.FORWARD if body.forward_only else OperationKind.FORWARD_BACKWARD
        case StepOptimizer():
            return OperationKind.OPTIM_STEP
        case SaveTrainState():
            return OperationKind.SAVE_WEIGHTS
        case SaveSnapshot():
            return OperationKind.SAVE_WEIGHTS_FOR_SAMPLER
        case SaveExternalWeights():
            return OperationKind.SAVE_WEIGHTS_EXTERNAL
        case LoadTrainState():
            return OperationKind.LOAD_WEIGHTS
        case LoadAdapterWeights():
            return OperationKind.LOAD_ADAPTER
        case CreateHandle():
            return OperationKind.CREATE_MODEL
        case UnloadHandle():
            return OperationKind.UNLOAD_MODEL
        case Refused():
            return operation.kind


# From requests ---------------------------------------------------------------------------------


def run_pass(body: Pass | RejectedPass) -> RunPass | Refused:
    if isinstance(body, Pass):
        return RunPass(body)
    forward, backward = OperationKind.FORWARD, OperationKind.FORWARD_BACKWARD
    return Refused(forward if body.forward_only else backward, body.error)


def step_optimizer(request: OptimStepRequest) -> StepOptimizer | Refused:
    try:
        fields = adam_fields(request)
        return StepOptimizer(_adam(fields), _normalization(request, fields), _norm_metrics(fields))
    except HomefireError as error:
        return refuse(OperationKind.OPTIM_STEP, error)


def _adam(fields: AdamFields) -> AdamParams:
    names = AdamParams.__struct_fields__
    given = {name: getattr(fields, name) for name in names}
    return AdamParams(**{name: value for name, value in given.items() if value is not None})


def _normalization(request: OptimStepRequest, fields: AdamFields) -> GradNormalization:
    asked = request.grad_accumulation_normalization or fields.grad_accumulation_normalization
    try:
        return GradNormalization(asked or "none")
    except ValueError as exc:
        known = ", ".join(GradNormalization)
        field = "grad_accumulation_normalization"
        raise InvalidArgument(
            f"{field} {asked!r} is unknown", hint=f"use {known}", field=field
        ) from exc


def _norm_metrics(fields: AdamFields) -> GradNormMetrics:
    asked = fields.emit_grad_norm_metrics
    if asked is None or isinstance(asked, bool):
        return GradNormMetrics.BASIC if asked else GradNormMetrics.OFF
    try:
        return GradNormMetrics(asked)
    except ValueError as exc:
        known = ", ".join(GradNormMetrics)
        field = "emit_grad_norm_metrics"
        raise InvalidArgument(
            f"{field} {asked!r} is unknown", hint=f"use true, false, {known}", field=field
        ) from exc


def text_metadata(given: Mapping[str, Any] | None) -> dict[str, str]:
    return {key: str(value) for key, value in (given or {}).items()}
