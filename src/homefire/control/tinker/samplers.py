"""Samplers of the root plane: deployments that serve a base model and what its jobs save.

A sampling session's id says all that a sampler needs; its row is there for listings only.
"""

from __future__ import annotations

import asyncio
import sqlite3
from dataclasses import dataclass
from pathlib import Path

import msgspec

from homefire.checkpoints import CheckpointStore
from homefire.control.capacity import Capacity, never_fits
from homefire.control.db import tables, tinker_tables
from homefire.control.db.database import Database
from homefire.control.db.rows import (
    BaseModel,
    DeploymentConfig,
    DeploymentRow,
    DesiredWeights,
    JobRow,
    SamplingSessionRow,
    TinkerRunRow,
)
from homefire.control.deployments import forgive_replicas
from homefire.control.footprint import replica_need
from homefire.control.lifecycle import DEPLOYMENT_LIVE, DeploymentEvent, deployment_after
from homefire.control.reconcile import Reconciler
from homefire.control.tinker.base_models import BaseModels
from homefire.control.tinker.checkpoint_paths import (
    CheckpointHome,
    check_exists,
    find_home,
    sampler_path,
)
from homefire.control.tinker.sessions import find_open_session
from homefire.foundation.clock import Clock
from homefire.wire.checkpoint_paths import CheckpointPath
from homefire.wire.errors import (
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Unavailable,
    Unsupported,
)
from homefire.wire.pooled import (
    SamplingSession,
    job_of_sampler,
    parse_sampling_session,
    pool_job_id,
    sampler_id,
)
from homefire.wire.resources import DeploymentState
from homefire.wire.tinker_root import CreateSamplingSession, Sampler


class SamplingPlan(msgspec.Struct, frozen=True):
    """What a sampling session samples from, and what of."""

    job: str
    model: BaseModel
    named: str
    """The base model as the client knows it."""
    snapshot: CheckpointPath | None
    """None: the base model."""


@dataclass(frozen=True)
class Samplers:
    database: Database
    store: CheckpointStore
    models: BaseModels
    reconciler: Reconciler
    capacity: Capacity
    clock: Clock

    async def create_session(self, account: str, request: CreateSamplingSession) -> str:
        """The session's id; its sampler is on its way. The same request gives the same id."""
        await self.database.transact(lambda c: find_open_session(c, account, request.session_id))
        plan = await self._plan(account, request)
        sampler = await asyncio.to_thread(self._sampler, account, plan.job, plan.model)
        session = SamplingSession.of(
            sampler.id,
            request.session_id,
            request.sampling_session_seq_id,
            run=plan.snapshot.run if plan.snapshot else "",
            snapshot=plan.snapshot.name if plan.snapshot else "",
        )
        row = SamplingSessionRow(
            id=session.id,
            account=account,
            session=request.session_id,
            seq_id=request.sampling_session_seq_id,
            sampler=sampler.id,
            base_model=plan.named,
            model_path=session.model_path,
            created_at=self.clock.now(),
        )

        def work(connection: sqlite3.Connection) -> None:
            self._ensure(connection, sampler)
            tinker_tables.insert_sampling_session(connection, row)

        await self.database.transact(work)
        self.reconciler.wake()
        return row.id

    async def place(self, account: str, path: str) -> str:
        """The sampler of a snapshot that is asked for outside of any session, on its way."""
        plan = await self._plan_snapshot(account, path, None)
        sampler = await asyncio.to_thread(self._sampler, account, plan.job, plan.model)
        await self.database.transact(lambda c: self._ensure(c, sampler))
        self.reconciler.wake()
        return sampler.id

    async def describe(self, account: str, session_id: str) -> Sampler:
        """Also of a session that a trainer made for an ephemeral save. NotFound."""
        try:
            session = parse_sampling_session(session_id)
        except InvalidArgument as exc:
            raise NotFound(exc.message, hint=exc.hint) from exc
        base_model = await self.database.transact(lambda c: _base_model(c, account, session))
        return Sampler(session_id, base_model, session.model_path)

    async def wake(self, account: str, sampler: str) -> None:
        """For a request that names it: starts what is parked, makes what a trainer's save implied.

        What failed or is being deleted is left as it is: its route says so.
        """
        found = await self.database.transact(lambda c: tables.deployment(c, sampler))
        if found is None or found.state is DeploymentState.DELETED:
            job = await self.database.transact(lambda c: _job_sampled_by(c, account, sampler))
            template = await asyncio.to_thread(
                self._sampler, account, job.id, job.config.base_model
            )
            await self.database.transact(lambda c: self._ensure(c, template))
        elif found.account != account:
            raise _no_sampler(account, sampler)
        elif found.state not in DEPLOYMENT_LIVE or found.config.num_replicas > 0:
            return
        else:
            await self.database.transact(lambda c: self._ensure(c, found))
        self.reconciler.wake()

    async def _plan(self, account: str, request: CreateSamplingSession) -> SamplingPlan:
        if request.model_path is not None:
            return await self._plan_snapshot(account, request.model_path, request.base_model)
        if not request.base_model:
            raise InvalidArgument(
                "neither base_model nor model_path is given",
                hint="name a base model, or tinker://<run>/sampler_weights/<name>",
                field="base_model",
            )
        model = await self.models.resolve(request.base_model)
        return SamplingPlan(pool_job_id(account, model.directory), model, request.base_model, None)

    async def _plan_snapshot(self, account: str, path: str, base_model: str | None) -> SamplingPlan:
        parsed = sampler_path(path, field="model_path")
        home = await self.database.transact(
            lambda c: find_home(c, account, parsed, field="model_path")
        )
        await asyncio.to_thread(check_exists, self.store, home, parsed, field="model_path")
        run = _run_of(home, path)
        if base_model:
            await self.models.check_same(base_model, home.job.config.base_model, because=path)
        return SamplingPlan(
            home.job.id, home.job.config.base_model, base_model or run.base_model, parsed
        )

    def _sampler(self, account: str, job: str, model: BaseModel) -> DeploymentRow:
        """As it would be created. Blocks on the disk."""
        need = replica_need(Path(model.directory))
        if (lack := never_fits(self.capacity, need)) is not None:
            raise FailedPrecondition(
                f"{model.name} cannot be sampled here, {lack}",
                hint="use a smaller model, or a larger machine",
                field="base_model",
            )
        now = self.clock.now()
        return DeploymentRow(
            id=sampler_id(job),
            account=account,
            state=DeploymentState.CREATING,
            message="",
            config=DeploymentConfig(
                base_model=model,
                need=need,
                num_replicas=1,
                min_replica_count=0,
                max_replica_count=1,
                max_context_length=model.max_context_length,
                display_name=f"sampler of {job}",
                enable_hot_load=False,
                samples_job=job,
            ),
            desired=DesiredWeights(),
            purge=False,
            ledger_since=0.0,
            created_at=now,
            updated_at=now,
        )

    def _ensure(self, connection: sqlite3.Connection, sampler: DeploymentRow) -> None:
        """It is there and wants one replica: made, or woken up, or given another chance."""
        found = tables.deployment(connection, sampler.id)
        if found is None or found.state is DeploymentState.DELETED:
            tables.insert_deployment(connection, sampler)
            return
        if found.state is DeploymentState.DELETING:
            raise Unavailable(f"sampler {sampler.id} is {found.state}", hint="retry in a second")
        if found.state is DeploymentState.FAILED or found.config.num_replicas == 0:
            now = self.clock.now()
            config = msgspec.structs.replace(found.config, num_replicas=1)
            tables.configure_deployment(connection, found, config, now=now)
            to = deployment_after(found, DeploymentEvent.RESIZED)
            tables.advance_deployment(connection, found, to, message="", now=now)
            forgive_replicas(connection, found)


def _run_of(home: CheckpointHome, path: str) -> TinkerRunRow:
    if home.run is None:
        raise Unsupported(
            f"{path} was saved by dedicated trainer job {home.job.id}, which has no sampler",
            hint="hot load it into a deployment, and sample through that",
            field="model_path",
        )
    return home.run


def _base_model(connection: sqlite3.Connection, account: str, session: SamplingSession) -> str:
    """As the client named it where that is known: by the session, or by the run."""
    row = tinker_tables.sampling_session(connection, session.id)
    if row is not None and row.account == account:
        return row.base_model
    run = tinker_tables.run(connection, session.run) if session.run else None
    if run is not None and run.account == account:
        return run.base_model
    sampler = tables.deployment(connection, session.sampler)
    if sampler is not None and sampler.account == account and sampler.config.samples_job:
        return sampler.config.base_model.name
    return _job_sampled_by(connection, account, session.sampler).config.base_model.name


def _job_sampled_by(connection: sqlite3.Connection, account: str, sampler: str) -> JobRow:
    job_id = job_of_sampler(sampler)
    job = tables.job(connection, job_id) if job_id else None
    if job is None or job.account != account or not job.config.pooled:
        raise _no_sampler(account, sampler)
    return job


def _no_sampler(account: str, sampler: str) -> NotFound:
    return NotFound(
        f"sampler {sampler!r} does not exist in account {account!r}",
        hint="create one with create_sampling_client",
    )
