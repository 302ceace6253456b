"""What users do with deployments."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Set
from dataclasses import dataclass

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
)
from homefire.control.deployment_config import (
    bucket_error,
    check_fits,
    check_patchable,
    configured,
    patched,
)
from homefire.control.jobs import find_job
from homefire.control.lifecycle import DeploymentEvent, deployment_after, is_asleep
from homefire.control.names import check_id, id_in
from homefire.control.reconcile import Reconciler
from homefire.control.supervision import after_request
from homefire.foundation.clock import Clock
from homefire.wire.errors import FailedPrecondition, InvalidArgument, NotFound
from homefire.wire.ids import new_id
from homefire.wire.resources import DeploymentRequest, DeploymentState


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
        config = await asyncio.to_thread(
            configured,
            request,
            account=account,
            catalog=self.catalog,
            trainer=trainer,
            promoted=promoted,
        )
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

    async def list(self, account: str, *, tombstones: bool = False) -> list[DeploymentRow]:
        """Oldest first."""
        rows = await self.database.transact(tables.deployments)
        own = [row for row in rows if row.account == account]
        return [row for row in own if tombstones or row.state is not DeploymentState.DELETED]

    async def patch(
        self, account: str, deployment_id: str, request: DeploymentRequest, *, fields: Set[str]
    ) -> DeploymentRow:
        """Sets `fields` (snake_case) to what `request` says, and touches nothing else."""
        check_patchable(fields)
        trainer: BaseModel | None = None
        if "hot_load_trainer_job" in fields:
            trainer = await self._trainer(account, deployment_id, request)

        def change(row: DeploymentRow) -> DeploymentConfig:
            check_fits(row.config.base_model, trainer)
            return patched(row, request, fields)

        return await self._change(account, deployment_id, change)

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

    async def wake(self, account: str, deployment_id: str) -> None:
        """For a request that names it: one that was scaled to zero starts as many replicas as its minimum,
        at least one. Any other is left as it is. NotFound."""
        row = await self.get(account, deployment_id)
        if is_asleep(row):
            await self.scale(account, deployment_id, max(1, row.config.min_replica_count))

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

    async def undelete(self, account: str, deployment_id: str) -> DeploymentRow:
        """A tombstone comes back with its configuration, and serves the weights it served."""

        def work(connection: sqlite3.Connection) -> DeploymentRow:
            row = find_deployment(connection, account, deployment_id)
            to = deployment_after(row, DeploymentEvent.UNDELETE)
            tables.advance_deployment(connection, row, to, message="", now=self.clock.now())
            return find_deployment(connection, account, deployment_id)

        revived = await self.database.transact(work)
        self.reconciler.wake()
        return revived

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
            event = _event_of(row, config)
            if event is not None:
                to = deployment_after(row, event)
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
            raise bucket_error(request.hot_load_bucket_url, named)
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


def _event_of(row: DeploymentRow, config: DeploymentConfig) -> DeploymentEvent | None:
    """What the new configuration means to the deployment's state."""
    if config.num_replicas != row.config.num_replicas or row.state is DeploymentState.FAILED:
        return DeploymentEvent.RESIZED
    if config.hot_load_trainer_job != row.config.hot_load_trainer_job:
        return DeploymentEvent.REATTACHED
    return None


def _check_changeable(row: DeploymentRow) -> None:
    if row.state in (DeploymentState.DELETING, DeploymentState.DELETED):
        raise FailedPrecondition(f"deployment {row.id!r} is {row.state}")
