"""What users do with deployments."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from homefire.control.capacity import Capacity, never_fits
from homefire.control.catalog import Catalog
from homefire.control.db import tables
from homefire.control.db.database import Database
from homefire.control.db.rows import (
    BaseModel,
    DeploymentConfig,
    DeploymentRow,
    DesiredWeights,
    ModelRow,
)
from homefire.control.footprint import replica_need
from homefire.control.jobs import find_job
from homefire.control.lifecycle import DeploymentEvent, deployment_after
from homefire.control.names import check_id, id_in
from homefire.control.reconcile import Reconciler
from homefire.control.supervision import after_request
from homefire.foundation.clock import Clock
from homefire.wire.errors import FailedPrecondition, InvalidArgument, NotFound, Unsupported
from homefire.wire.ids import job_name, new_id
from homefire.wire.resources import DeploymentRequest, DeploymentState

LARGEST_REPLICA_COUNT = 64
_BUCKET_TYPES = {"FW_HOSTED", "BUCKET_TYPE_UNSPECIFIED"}
_TRANSITIONS = {"HOT_LOAD_TRANSITION_TYPE_UNSPECIFIED", "SYNC", "ASYNC", "DRAIN"}
_KEPT: dict[str, Any] = {
    "display_name": "",
    "description": "",
    "enable_hot_load": True,
    "hot_load_bucket_type": "FW_HOSTED",
    "deployment_shape": None,
    "accelerator_type": None,
    "for_training": False,
    "annotations": {},
}
"""Fields that are kept as given, with what they are when they are not."""
_COUNTS = {"min_replica_count": 0, "max_replica_count": 1}
_PATCHABLE = {
    *_KEPT,
    *_COUNTS,
    "hot_load_trainer_job",
    "hot_load_transition_type",
    "placement",
    "base_model",
}


@dataclass(frozen=True)
class Deployments:
    database: Database
    catalog: Catalog
    reconciler: Reconciler
    capacity: Capacity
    clock: Clock

    async def create(
        self, account: str, request: DeploymentRequest, *, deployment_id: str | None
    ) -> DeploymentRow:
        """The row at once, in CREATING. One replica is started unless `maxReplicaCount` is 0."""
        deployment_id = check_id(deployment_id or new_id("deployment"), field="deploymentId")
        trainer = await self._trainer(account, deployment_id, request)
        promoted = await self.database.transact(tables.models)
        config = await asyncio.to_thread(self._configure, account, request, trainer, promoted)
        if (lack := never_fits(self.capacity, config.need)) is not None:
            raise FailedPrecondition(
                f"{config.base_model.name} cannot be served here, {lack}",
                hint="use a smaller model, or a larger machine",
            )
        now = self.clock.now()
        deployment = DeploymentRow(
            id=deployment_id,
            account=account,
            state=DeploymentState.CREATING,
            message="",
            config=config,
            desired=DesiredWeights(),
            purge=False,
            ledger_since=0.0,
            created_at=now,
            updated_at=now,
        )
        await self.database.transact(lambda c: tables.insert_deployment(c, deployment))
        self.reconciler.wake()
        return deployment

    async def get(self, account: str, deployment_id: str) -> DeploymentRow:
        """NotFound, also for another account's deployment."""
        return await self.database.transact(lambda c: find_deployment(c, account, deployment_id))

    async def list(self, account: str) -> list[DeploymentRow]:
        """Oldest first, without tombstones."""
        rows = await self.database.transact(tables.deployments)
        gone = DeploymentState.DELETED
        return [row for row in rows if row.account == account and row.state is not gone]

    async def patch(
        self, account: str, deployment_id: str, request: DeploymentRequest, *, fields: Set[str]
    ) -> DeploymentRow:
        """Sets `fields` (snake_case) to what `request` says, and touches nothing else."""
        unknown = fields - _PATCHABLE
        if unknown:
            raise InvalidArgument(
                f"updateMask names {', '.join(sorted(unknown))}, which cannot be updated",
                hint=f"what can: {', '.join(sorted(_PATCHABLE))}",
                field="updateMask",
            )
        if "hot_load_trainer_job" in fields:
            await self._trainer(account, deployment_id, request)
        return await self._change(
            account,
            deployment_id,
            lambda row: _patched(row, account, request, fields),
        )

    async def scale(self, account: str, deployment_id: str, replica_count: int) -> DeploymentRow:
        def change(row: DeploymentRow) -> DeploymentConfig:
            most = row.config.max_replica_count
            if not 0 <= replica_count <= most:
                raise InvalidArgument(
                    f"replicaCount {replica_count} is not between 0 and maxReplicaCount {most}",
                    hint="raise maxReplicaCount first",
                    field="replicaCount",
                )
            return msgspec.structs.replace(row.config, num_replicas=replica_count)

        return await self._change(account, deployment_id, change)

    async def delete(self, account: str, deployment_id: str, *, hard: bool) -> DeploymentRow:
        """Stops the replicas. `hard` leaves no tombstone. A second time changes nothing."""

        def work(connection: sqlite3.Connection) -> DeploymentRow:
            row = find_deployment(connection, account, deployment_id)
            if hard:
                tables.mark_purge(connection, row.id)
            if row.state not in (DeploymentState.DELETING, DeploymentState.DELETED):
                to = deployment_after(row, DeploymentEvent.DELETE)
                now = self.clock.now()
                tables.advance_deployment(connection, row, to, message="", now=now)
            deleted = find_deployment(connection, account, deployment_id)
            if hard and deleted.state is DeploymentState.DELETED:
                tables.remove_deployment(connection, row.id)
            return deleted

        deleted = await self.database.transact(work)
        self.reconciler.wake()
        return deleted

    async def clear_ledger(self, account: str, deployment_id: str) -> None:
        def work(connection: sqlite3.Connection) -> None:
            row = find_deployment(connection, account, deployment_id)
            tables.clear_ledger(connection, row.id, now=self.clock.now())

        await self.database.transact(work)

    async def _change(
        self,
        account: str,
        deployment_id: str,
        change: Callable[[DeploymentRow], DeploymentConfig],
    ) -> DeploymentRow:
        def work(connection: sqlite3.Connection) -> DeploymentRow:
            row = find_deployment(connection, account, deployment_id)
            _check_changeable(row)
            config = change(row)
            now = self.clock.now()
            tables.configure_deployment(connection, row, config, now=now)
            resized = config.num_replicas != row.config.num_replicas
            if resized or row.state is DeploymentState.FAILED:
                to = deployment_after(row, DeploymentEvent.RESIZED)
                tables.advance_deployment(connection, row, to, message="", now=now)
                forgive_replicas(connection, row)
            return find_deployment(connection, account, deployment_id)

        changed = await self.database.transact(work)
        self.reconciler.wake()
        return changed

    async def _trainer(
        self, account: str, deployment_id: str, request: DeploymentRequest
    ) -> BaseModel | None:
        """The base model of the trainer that the request names; checks that it may be named."""
        named = request.hot_load_trainer_job
        if request.hot_load_bucket_url:
            raise _bucket_error(request.hot_load_bucket_url, named)
        if not named:
            return None
        job_id = id_in(
            named, collection="rlorTrainerJobs", account=account, field="hotLoadTrainerJob"
        )
        job = await self.database.transact(lambda c: find_job(c, account, job_id))
        if job.config.request.hot_load_deployment_id:
            raise InvalidArgument(
                f"hotload flow mismatch: trainer {job_id!r} writes to deployment"
                f" {job.config.request.hot_load_deployment_id!r}, so deployment"
                f" {deployment_id!r} cannot follow it",
                hint="create the trainer without hotLoadDeploymentId",
                field="hotLoadTrainerJob",
            )
        return job.config.base_model

    def _configure(
        self,
        account: str,
        request: DeploymentRequest,
        trainer: BaseModel | None,
        promoted: list[ModelRow],
    ) -> DeploymentConfig:
        """What the request resolves to. Blocks on the disk."""
        name = request.base_model or (trainer.name if trainer else None)
        if not name:
            raise InvalidArgument(
                "baseModel is missing",
                hint="name a base model, or a hotLoadTrainerJob that has one",
                field="baseModel",
            )
        model = self.catalog.resolve(name, promoted)
        if trainer is not None and trainer.directory != model.directory:
            raise InvalidArgument(
                f"the deployment's base model {name} is not {trainer.name}, which"
                f" {request.hot_load_trainer_job} trains: its snapshots would not fit",
                hint="use the trainer's base model",
                field="baseModel",
            )
        fewest, most = _counts(request.min_replica_count, request.max_replica_count)
        kept = _kept(request, set(_KEPT))
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
            **kept,
        )


def find_deployment(
    connection: sqlite3.Connection, account: str, deployment_id: str
) -> DeploymentRow:
    row = tables.deployment(connection, deployment_id)
    if row is None or row.account != account:
        raise NotFound(
            f"deployment {deployment_id!r} does not exist in account {account!r}",
            hint="list the account's deployments",
        )
    return row


def forgive_replicas(connection: sqlite3.Connection, deployment: DeploymentRow) -> None:
    """Deaths before the user's request do not count against what is started after it."""
    for replica in tables.replicas(connection):
        if replica.deployment == deployment.id:
            forgiven = after_request(replica.supervision)
            tables.supervise_replica(connection, replica.deployment, replica.number, forgiven)


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


def _patched(
    row: DeploymentRow, account: str, request: DeploymentRequest, fields: Set[str]
) -> DeploymentConfig:
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
        changes["hot_load_trainer_job"] = _full_job_name(request.hot_load_trainer_job, account)
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
            f" the limit of {model.name}",
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


def _bucket_error(url: str, trainer: str | None) -> InvalidArgument | Unsupported:
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


def _check_changeable(row: DeploymentRow) -> None:
    if row.state in (DeploymentState.DELETING, DeploymentState.DELETED):
        raise FailedPrecondition(f"deployment {row.id!r} is {row.state}")
