"""Training runs of the root plane: which job trains a run, found, made or woken up."""

from __future__ import annotations

import asyncio
import sqlite3
from dataclasses import dataclass

import msgspec

from homefire.checkpoints import CheckpointStore
from homefire.control.db import tables, tinker_tables
from homefire.control.db.database import Database
from homefire.control.db.rows import BaseModel, JobRow, TinkerRunRow
from homefire.control.reconcile import Reconciler
from homefire.control.tinker.base_models import BaseModels
from homefire.control.tinker.checkpoint_paths import check_exists, find_home, state_path
from homefire.control.tinker.root_jobs import MAX_POOLED_RANK, RootJobs
from homefire.control.tinker.sessions import find_open_session
from homefire.foundation.clock import Clock
from homefire.wire.errors import InvalidArgument, NotFound
from homefire.wire.ids import model_id
from homefire.wire.internal import NewRun, RunPlace

DEFAULT_RANK = 32
"""The protocol's, where a client sends no lora_config."""


class RunPlan(msgspec.Struct, frozen=True):
    """What a new run resolved to."""

    model: BaseModel
    named: str
    """The base model as the client knows it."""
    lora_rank: int


@dataclass(frozen=True)
class Runs:
    database: Database
    store: CheckpointStore
    models: BaseModels
    jobs: RootJobs
    reconciler: Reconciler
    clock: Clock

    async def place(self, new: NewRun) -> RunPlace:
        """The job that trains this run, on its way; the same run again is the same place.

        Everything that can be refused is refused before anything is made.
        """
        run_id = model_id(new.session_id, new.model_seq_id)
        known = await self.database.transact(lambda c: self._known(c, new, run_id))
        if known is None:
            plan = await self._plan(new)
            now = self.clock.now()
            job = await asyncio.to_thread(self._job, new.account, run_id, plan, now)
            run = _run(new, run_id, plan, job, now=now)
            known = await self.database.transact(lambda c: self._insert(c, new, run, job))
        self.reconciler.wake()
        return RunPlace(known.id, known.job)

    async def find(self, account: str, run_id: str) -> RunPlace:
        """Where a run trains, for a request that names it: what is parked is woken up.

        NotFound, and FailedPrecondition when its session was finished.
        """
        now = self.clock.now()

        def work(connection: sqlite3.Connection) -> tuple[TinkerRunRow, bool]:
            run = find_run(connection, account, run_id)
            find_open_session(connection, account, run.session)
            tinker_tables.touch_run(connection, run.id, last_request_at=now)
            job = tables.job(connection, run.job)
            return run, job is not None and self.jobs.wake(connection, job, now=now)

        run, woken = await self.database.transact(work)
        if woken:
            self.reconciler.wake()
        return RunPlace(run.id, run.job)

    def _known(
        self, connection: sqlite3.Connection, new: NewRun, run_id: str
    ) -> TinkerRunRow | None:
        find_open_session(connection, new.account, new.session_id)
        run = tinker_tables.run(connection, run_id)
        job = tables.job(connection, run.job) if run else None
        if job is not None:
            self.jobs.start(connection, job, now=self.clock.now())
        return run

    def _insert(
        self, connection: sqlite3.Connection, new: NewRun, run: TinkerRunRow, job: JobRow
    ) -> TinkerRunRow:
        known = self._known(connection, new, run.id)
        if known is not None:
            return known
        self.jobs.ensure(connection, job, now=run.created_at)
        tinker_tables.insert_run(connection, run)
        return run

    async def _plan(self, new: NewRun) -> RunPlan:
        if new.path is not None:
            return await self._plan_from_checkpoint(new, new.path)
        if not new.base_model:
            raise InvalidArgument(
                "base_model is missing", hint="name a base model", field="base_model"
            )
        rank = DEFAULT_RANK if new.rank is None else new.rank
        if not 0 <= rank <= MAX_POOLED_RANK:
            raise InvalidArgument(
                f"lora_config.rank {rank} is not between 0 and {MAX_POOLED_RANK}",
                hint="0 trains all parameters",
                field="lora_config.rank",
            )
        return RunPlan(await self.models.resolve(new.base_model), new.base_model, rank)

    async def _plan_from_checkpoint(self, new: NewRun, path: str) -> RunPlan:
        parsed = state_path(path, field="path")
        home = await self.database.transact(
            lambda c: find_home(c, new.account, parsed, field="path")
        )
        key = await asyncio.to_thread(check_exists, self.store, home, parsed, field="path")
        manifest = await asyncio.to_thread(self.store.manifest, key)
        model = home.job.config.base_model
        if new.base_model:
            await self.models.check_same(new.base_model, model, because=path)
        known_as = home.run.base_model if home.run else model.name
        rank = manifest.lora.rank if manifest.lora else 0
        return RunPlan(model, new.base_model or known_as, rank)

    def _job(self, account: str, run_id: str, plan: RunPlan, now: float) -> JobRow:
        """Blocks on the disk."""
        if plan.lora_rank == 0:
            return self.jobs.full_run(account, run_id, plan.model, now=now)
        return self.jobs.pool(account, plan.model, now=now)


def find_run(connection: sqlite3.Connection, account: str, run_id: str) -> TinkerRunRow:
    run = tinker_tables.run(connection, run_id)
    if run is None or run.account != account:
        raise no_run(account, run_id)
    return run


def no_run(account: str, run_id: str) -> NotFound:
    """In the same words for another account's run and for one that never was."""
    return NotFound(
        f"training run {run_id!r} does not exist in account {account!r}",
        hint="create a model first; `tinker run list` shows the runs of this account",
        field="model_id",
    )


def _run(new: NewRun, run_id: str, plan: RunPlan, job: JobRow, *, now: float) -> TinkerRunRow:
    return TinkerRunRow(
        id=run_id,
        account=new.account,
        session=new.session_id,
        model_seq_id=new.model_seq_id,
        job=job.id,
        base_model=plan.named,
        lora_rank=plan.lora_rank,
        user_metadata=new.user_metadata,
        source_path=new.path,
        created_at=now,
        last_request_at=now,
    )
