"""What a client asks to be saved, as operations: names, kinds, and how long they are kept."""

from __future__ import annotations

from homefire.trainer.front.operations import (
    OperationKind,
    Refused,
    SaveExternalWeights,
    SaveSnapshot,
    SaveTrainState,
    refuse,
    text_metadata,
)
from homefire.wire.engine import MERGED_BASE
from homefire.wire.errors import HomefireError, InvalidArgument, Unsupported
from homefire.wire.pooled import SamplingSession, ephemeral_name, is_ephemeral
from homefire.wire.tinker import SaveWeights, SaveWeightsExternal, SaveWeightsForSampler

SAMPLER_TYPE_KEY = "homefire.checkpoint_type"
EPHEMERAL_TTL_S = 24 * 3600
"""Of a snapshot that was saved for its sampling session alone, unless the client says otherwise."""
_SAMPLER_TYPES = frozenset({"base", "delta", MERGED_BASE})
_EXPORT_PRECISIONS = ("source", "bf16")
"""Both are the serving dtype, which a base model is rounded to when it is loaded."""
_SAMPLING_CLIENT_KINDS = frozenset({"snapshot", "inflight"})
"""An inflight client may get newer weights than those it was made with; ours never do."""


def save_train_state(request: SaveWeights) -> SaveTrainState | Refused:
    try:
        return SaveTrainState(
            name=request.path,
            overwrite=bool(request.overwrite),
            ttl_seconds=_checked_ttl(request.ttl_seconds),
            metadata=text_metadata(request.user_metadata),
        )
    except HomefireError as error:
        return refuse(OperationKind.SAVE_WEIGHTS, error)


def save_external(request: SaveWeightsExternal) -> SaveExternalWeights | Refused:
    try:
        if request.age_encryption_recipients:
            raise Unsupported(
                "age_encryption_recipients: exports are not encrypted by this version",
                hint="save without recipients, and encrypt the files after the download",
                field="age_encryption_recipients",
            )
        return SaveExternalWeights(name=request.path, ttl_seconds=_checked_ttl(request.ttl_seconds))
    except HomefireError as error:
        return refuse(OperationKind.SAVE_WEIGHTS_EXTERNAL, error)


def save_snapshot(
    request: SaveWeightsForSampler, *, sampler: str, session_id: str, run: str
) -> SaveSnapshot | Refused:
    """`sampler` is the deployment that samples what the job saves, or empty; `run` the model's slot."""
    try:
        if request.kind not in (None, *_SAMPLING_CLIENT_KINDS):
            raise InvalidArgument(
                f"kind {request.kind!r} is unknown", hint="use snapshot or inflight", field="kind"
            )
        if request.path is None:
            return _ephemeral_snapshot(request, sampler=sampler, session_id=session_id, run=run)
        return _named_snapshot(request, request.path)
    except HomefireError as error:
        return refuse(OperationKind.SAVE_WEIGHTS_FOR_SAMPLER, error)


def _named_snapshot(request: SaveWeightsForSampler, name: str) -> SaveSnapshot:
    """The type is the request's, else what our SDK puts into the metadata, else base.

    An adapter is always written whole, unless it is merged into its base.
    """
    if is_ephemeral(name):
        raise InvalidArgument(
            f"path {name!r} is a name of snapshots that no list shows",
            hint="save under another name",
            field="path",
        )
    metadata = text_metadata(request.user_metadata or request.metadata)
    asked = request.checkpoint_type or metadata.pop(SAMPLER_TYPE_KEY, None) or "base"
    if asked not in _SAMPLER_TYPES:
        raise _unknown_type(asked)
    _check_precision(request.export_precision, asked)
    return SaveSnapshot(
        name=name,
        checkpoint_type=asked,
        ttl_seconds=_checked_ttl(request.ttl_seconds),
        metadata=metadata,
    )


def _ephemeral_snapshot(
    request: SaveWeightsForSampler, *, sampler: str, session_id: str, run: str
) -> SaveSnapshot:
    """Named after its number, so that a retry, and a replay, mean the same snapshot and session."""
    number = request.sampling_session_seq_id
    if not sampler:
        raise Unsupported(
            "save_weights_for_sampler without a path: a dedicated trainer does not sample",
            hint="save under a name, hot load it into a deployment and sample there",
            field="path",
        )
    if number is None:
        raise InvalidArgument(
            "save_weights_for_sampler has neither path nor sampling_session_seq_id",
            hint="send one of them",
            field="path",
        )
    nonce = SamplingSession.of(sampler, session_id, number).nonce
    name = ephemeral_name(request.seq_id, nonce)
    session = SamplingSession.of(sampler, session_id, number, run=run, snapshot=name)
    ttl_seconds = _checked_ttl(request.ttl_seconds)
    return SaveSnapshot(
        name=name,
        checkpoint_type="base",
        ttl_seconds=EPHEMERAL_TTL_S if ttl_seconds is None else ttl_seconds,
        metadata=text_metadata(request.user_metadata),
        sampling_session_id=session.id,
    )


def _checked_ttl(ttl_seconds: int | None) -> int | None:
    if ttl_seconds is not None and ttl_seconds <= 0:
        raise InvalidArgument(
            f"ttl_seconds is {ttl_seconds}",
            hint="give a number of seconds above 0, or none to keep the checkpoint",
            field="ttl_seconds",
        )
    return ttl_seconds


def _unknown_type(asked: str) -> HomefireError:
    return InvalidArgument(
        f"checkpoint_type {asked!r} is unknown",
        hint=f"use base, delta or {MERGED_BASE}",
        field="checkpoint_type",
    )


def _check_precision(precision: str | None, checkpoint_type: str) -> None:
    if precision is None:
        return
    field = "export_precision"
    if checkpoint_type != MERGED_BASE:
        raise InvalidArgument(
            f"export_precision goes with checkpoint_type {MERGED_BASE!r}, not {checkpoint_type!r}",
            hint="leave it out",
            field=field,
        )
    if precision not in _EXPORT_PRECISIONS:
        raise Unsupported(
            f"export_precision {precision!r} is not supported",
            hint=f"use {' or '.join(_EXPORT_PRECISIONS)}",
            field=field,
        )
