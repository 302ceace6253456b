"""What a deployment's request resolves to, and what a patch makes of it.

Fields of the hosted service that mean nothing on one's own machine are kept and given back; those whose
effect on the answers could not be kept are refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import msgspec

from homefire.control.catalog import Catalog
from homefire.control.db.rows import BaseModel, DeploymentConfig, DeploymentRow, ModelRow
from homefire.control.footprint import replica_need
from homefire.control.names import id_in
from homefire.wire.errors import FailedPrecondition, InvalidArgument, Unsupported
from homefire.wire.ids import job_name
from homefire.wire.resources import DeploymentRequest

LARGEST_REPLICA_COUNT = 64
_BUCKET_TYPES = {"FW_HOSTED", "BUCKET_TYPE_UNSPECIFIED"}
_TRANSITIONS = {"HOT_LOAD_TRANSITION_TYPE_UNSPECIFIED", "SYNC", "ASYNC", "DRAIN"}
_SERVED_PRECISIONS = {None, "PRECISION_UNSPECIFIED", "BF16"}
_KEPT: dict[str, Any] = {
    "display_name": "",
    "description": "",
    "enable_hot_load": True,
    "hot_load_bucket_type": "FW_HOSTED",
    "deployment_shape": None,
    "accelerator_type": None,
    "accelerator_count": None,
    "for_training": False,
    "preemptible": False,
    "annotations": {},
}
"""Fields that are kept as given, with what they are when they are not."""
_COUNTS = {"min_replica_count": 0, "max_replica_count": 1}
_REFUSED = {"extra_args", "extra_values", "precision"}
_PATCHABLE = {
    *_KEPT,
    *_COUNTS,
    *_REFUSED,
    "hot_load_trainer_job",
    "hot_load_transition_type",
    "placement",
    "base_model",
}


def mask_fields(mask: str) -> set[str]:
    """Field names of an `updateMask`; `placement.region` counts as `placement`."""
    paths = [path.strip().partition(".")[0] for path in mask.split(",")]
    return {path for path in paths if path}


def given_fields(body: Mapping[str, Any]) -> set[str]:
    """Which fields of a DeploymentRequest a JSON body holds; unknown ones are ignored."""
    names = zip(
        DeploymentRequest.__struct_encode_fields__,
        DeploymentRequest.__struct_fields__,
        strict=True,
    )
    return {field for encoded, field in names if encoded in body} & _PATCHABLE


def check_patchable(fields: Set[str]) -> None:
    if unknown := fields - _PATCHABLE:
        raise InvalidArgument(
            f"updateMask names {', '.join(sorted(unknown))}, which cannot be updated",
            hint=f"what can: {', '.join(sorted(_PATCHABLE - _REFUSED))}",
            field="updateMask",
        )


def configured(
    request: DeploymentRequest,
    *,
    account: str,
    catalog: Catalog,
    trainer: BaseModel | None,
    promoted: list[ModelRow],
) -> DeploymentConfig:
    """What a new deployment's request resolves to. Blocks on the disk."""
    _refuse(request)
    name = request.base_model or (trainer.name if trainer else None)
    if not name:
        raise InvalidArgument(
            "baseModel is missing",
            hint="name a base model, or a hotLoadTrainerJob that has one",
            field="baseModel",
        )
    model = catalog.resolve(name, promoted)
    check_fits(model, trainer)
    fewest, most = _counts(request.min_replica_count, request.max_replica_count)
    return DeploymentConfig(
        base_model=model,
        need=replica_need(Path(model.directory)),
        num_replicas=min(most, max(1, fewest)),
        min_replica_count=fewest,
        max_replica_count=most,
        max_context_length=_context_length(request.max_context_length, model),
        hot_load_trainer_job=_full_job_name(request.hot_load_trainer_job, account),
        hot_load_transition_type=_transition(request.hot_load_transition_type),
        region=request.placement.region if request.placement else None,
        **_kept(request, set(_KEPT)),
    )


def patched(row: DeploymentRow, request: DeploymentRequest, fields: Set[str]) -> DeploymentConfig:
    """The row's config with `fields` as `request` says, and nothing else touched."""
    _refuse(request)
    config = row.config
    if "base_model" in fields and request.base_model not in (None, config.base_model.name):
        raise FailedPrecondition(
            f"the base model of deployment {row.id!r} is {config.base_model.name} for good",
            hint="create another deployment",
        )
    changes = _kept(request, fields)
    if "placement" in fields:
        changes["region"] = request.placement.region if request.placement else None
    if "hot_load_transition_type" in fields:
        changes["hot_load_transition_type"] = _transition(request.hot_load_transition_type)
    if "hot_load_trainer_job" in fields:
        changes["hot_load_trainer_job"] = _full_job_name(request.hot_load_trainer_job, row.account)
    if fields & set(_COUNTS):
        fewest, most = _counts(
            request.min_replica_count
            if "min_replica_count" in fields
            else config.min_replica_count,
            request.max_replica_count
            if "max_replica_count" in fields
            else config.max_replica_count,
        )
        changes["min_replica_count"], changes["max_replica_count"] = fewest, most
        changes["num_replicas"] = min(most, max(config.num_replicas, fewest, 1))
    return msgspec.structs.replace(config, **changes)


def check_fits(model: BaseModel, trainer: BaseModel | None) -> None:
    """A deployment loads the snapshots of a trainer of the same base model only."""
    if trainer is not None and trainer.directory != model.directory:
        raise InvalidArgument(
            f"the deployment's base model {model.name} is not {trainer.name}, which its trainer"
            " trains: its snapshots would not fit",
            hint="use the trainer's base model",
            field="baseModel",
        )


def bucket_error(url: str, trainer: str | None) -> InvalidArgument | Unsupported:
    if trainer:
        return InvalidArgument(
            f"hot_load_bucket_url {url} conflicts with hot_load_trainer_job {trainer}",
            hint="give hotLoadTrainerJob alone",
            field="hotLoadBucketUrl",
        )
    return Unsupported(
        f"hotLoadBucketUrl {url} is not supported",
        hint="give hotLoadTrainerJob: snapshots lie in the store of this home",
        field="hotLoadBucketUrl",
    )


def _refuse(request: DeploymentRequest) -> None:
    """What would change the answers and is not done here."""
    for field, given in (("extraArgs", request.extra_args), ("extraValues", request.extra_values)):
        if given:
            raise Unsupported(
                f"{field} are arguments of the hosted service's inference engine",
                hint=f"leave {field} out",
                field=field,
            )
    if request.precision not in _SERVED_PRECISIONS:
        raise Unsupported(
            f"precision {request.precision!r} is not supported: weights are served as the trainer"
            " computes with them, in BF16",
            hint="leave precision out",
            field="precision",
        )


def _full_job_name(named: str | None, account: str) -> str | None:
    if not named:
        return None
    job_id = id_in(named, collection="rlorTrainerJobs", account=account, field="hotLoadTrainerJob")
    return job_name(account, job_id)


def _kept(request: DeploymentRequest, fields: Set[str]) -> dict[str, Any]:
    """The kept fields among `fields`; null means the default again."""
    values = {name: getattr(request, name) for name in _KEPT if name in fields}
    if values.get("hot_load_bucket_type") not in {None, *_BUCKET_TYPES}:
        raise Unsupported(
            f"hotLoadBucketType {values['hot_load_bucket_type']!r} is not supported",
            hint="leave it out: snapshots lie in the store of this home",
            field="hotLoadBucketType",
        )
    return {name: _KEPT[name] if value is None else value for name, value in values.items()}


def _counts(fewest: int | None, most: int | None) -> tuple[int, int]:
    fewest = _COUNTS["min_replica_count"] if fewest is None else fewest
    most = max(_COUNTS["max_replica_count"], fewest) if most is None else most
    if not 0 <= fewest <= most <= LARGEST_REPLICA_COUNT:
        raise InvalidArgument(
            f"minReplicaCount {fewest} and maxReplicaCount {most} are not 0 <= min <= max <="
            f" {LARGEST_REPLICA_COUNT}",
            field="maxReplicaCount",
        )
    return fewest, most


def _context_length(asked: int | None, model: BaseModel) -> int:
    if asked is None:
        return model.max_context_length
    if not 0 < asked <= model.max_context_length:
        raise InvalidArgument(
            f"maxContextLength {asked} is not between 1 and {model.max_context_length},"
            f" {model.context_limit}",
            field="maxContextLength",
        )
    return asked


def _transition(asked: str | None) -> str | None:
    if asked is not None and asked not in _TRANSITIONS:
        raise InvalidArgument(
            f"hotLoadTransitionType {asked!r} is unknown",
            hint=f"use one of {', '.join(sorted(_TRANSITIONS))}",
            field="hotLoadTransitionType",
        )
    return asked
