"""What users do with trainer jobs. Each call changes a row; the reconciler does the rest."""

from __future__ import annotations

import asyncio
import re
import sqlite3
from dataclasses import dataclass
from pathlib import Path

import msgspec

from homefire.control.capacity import Capacity, never_fits
from homefire.control.catalog import Catalog
from homefire.control.db import tables
from homefire.control.db.database import Database
from homefire.control.db.rows import BaseModel, JobConfig, JobRow, ModelRow, Supervision
from homefire.control.footprint import activation_budget, micro_batch_tokens, trainer_need
from homefire.control.lifecycle import JOB_ALREADY, JOB_ENDED, JobEvent, job_after
from homefire.control.names import check_id, id_in
from homefire.control.rank_count import COUNT_FIELD, rank_count
from homefire.control.reconcile import Reconciler
from homefire.control.shapes import Shape, find_shape
from homefire.control.supervision import after_request
from homefire.control.trainer_keeper import admit_if_room
from homefire.foundation.clock import Clock
from homefire.wire.errors import (
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    SequenceTooLong,
    Unsupported,
)
from homefire.wire.ids import new_id
from homefire.wire.resources import JobState, TrainerJobRequest
from homefire.wire.retention import RetentionPolicy
from homefire.wire.specs import TrainerMode

LARGEST_LORA_RANK = 1024
PAUSED_MESSAGE = "paused; its next operation, or `homefire trainer resume`, goes on where it was"
_DURATION = re.compile(r"\d{1,9}(\.\d{1,9})?s")


@dataclass(frozen=True)
class Jobs:
    database: Database
    catalog: Catalog
    reconciler: Reconciler
    capacity: Capacity
    clock: Clock
    account: str
    """Whose training shapes are generated."""

    async def create(
        self,
        account: str,
        request: TrainerJobRequest,
        *,
        job_id: str | None,
        training_shape: str | None,
        deployment_id: str | None,
    ) -> JobRow:
        """The job's row at once, CREATING or PENDING; everything that can be refused is before."""
        job_id = check_id(job_id or new_id("job"), field="rlorTrainerJobId")
        request = _with_deployment(request, deployment_id)
        promoted = await self.database.transact(tables.models)
        config = await asyncio.to_thread(self._configure, request, training_shape, promoted)
        _require_room(self.capacity, config)
        now = self.clock.now()
        job = JobRow(
            id=job_id,
            account=account,
            state=JobState.PENDING,
            message="",
            config=config,
            supervision=Supervision(),
            created_at=now,
            updated_at=now,
        )
        created = await self.database.transact(lambda c: self._insert(c, job))
        self.reconciler.wake()
        return created

    async def get(self, account: str, job_id: str) -> JobRow:
        """Tombstones included. NotFound, also for another account's job."""
        return await self.database.transact(lambda c: find_job(c, account, job_id))

    async def list(self, account: str, *, tombstones: bool = False) -> list[JobRow]:
        """Oldest first."""
        jobs = await self.database.transact(tables.jobs)
        own = [job for job in jobs if job.account == account]
        return [job for job in own if tombstones or job.state is not JobState.DELETED]

    async def cancel(self, account: str, job_id: str) -> JobRow:
        return await self._request(account, job_id, JobEvent.CANCEL)

    async def resume(self, account: str, job_id: str) -> JobRow:
        """The same job goes on behind its last applied operation. A job that runs is left alone."""
        return await self._request(account, job_id, JobEvent.RESUME)

    async def pause(self, account: str, job_id: str) -> JobRow:
        """Its trainer stops behind a recovery point and gives its room back; see `resume`, `wake`."""
        return await self._request(account, job_id, JobEvent.PAUSE, message=PAUSED_MESSAGE)

    async def delete(self, account: str, job_id: str) -> JobRow:
        """Leaves a tombstone. A second time changes nothing."""
        return await self._request(account, job_id, JobEvent.DELETE)

    async def _request(
        self, account: str, job_id: str, event: JobEvent, *, message: str = ""
    ) -> JobRow:
        def move(connection: sqlite3.Connection) -> JobRow:
            return self._move(connection, account, job_id, event, message=message)

        job = await self.database.transact(move)
        self.reconciler.wake()
        return job

    def _move(
        self,
        connection: sqlite3.Connection,
        account: str,
        job_id: str,
        event: JobEvent,
        *,
        message: str,
    ) -> JobRow:
        job = find_job(connection, account, job_id)
        if (job.state, event) in JOB_ALREADY:
            return job
        to, now = job_after(job, event), self.clock.now()
        completed_at = now if to in JOB_ENDED else None
        tables.advance_job(connection, job, to, message=message, now=now, completed_at=completed_at)
        if event is JobEvent.RESUME:
            tables.supervise_job(connection, job.id, after_request(job.supervision))
            admit_if_room(connection, find_job(connection, account, job_id), self.capacity, now=now)
        return find_job(connection, account, job_id)

    def _insert(self, connection: sqlite3.Connection, job: JobRow) -> JobRow:
        _check_scope(connection, job)
        tables.insert_job(connection, job)
        admit_if_room(connection, job, self.capacity, now=job.created_at)
        return find_job(connection, job.account, job.id)

    def _configure(
        self, request: TrainerJobRequest, training_shape: str | None, promoted: list[ModelRow]
    ) -> JobConfig:
        """What the request resolves to. Blocks on the disk."""
        _refuse(request)
        asked = request.training_config
        shape = self._shape(training_shape, promoted)
        retention = (request.retention or RetentionPolicy()).check()
        name = asked.base_model or (shape.base_model if shape else None)
        if not name:
            raise InvalidArgument(
                "trainingConfig.baseModel is missing",
                hint="name a base model, or a training shape that has one",
                field="trainingConfig.baseModel",
            )
        model = self.catalog.resolve(name, promoted)
        mode, rank = _mode(request, shape)
        directory = Path(model.directory)
        ranks = rank_count(request, shape)
        need = trainer_need(directory, mode, ranks)
        return JobConfig(
            request=request,
            training_shape=training_shape,
            base_model=model,
            mode=mode,
            lora_rank=rank,
            max_context_length=_context_length(asked.max_context_length, shape, model),
            need=need,
            micro_batch_tokens=micro_batch_tokens(directory, need, self.capacity, ranks),
            activations=activation_budget(directory, need, self.capacity, ranks),
            ranks=ranks,
            retention=retention,
        )

    def _shape(self, name: str | None, promoted: list[ModelRow]) -> Shape | None:
        return find_shape(name, self.account, self.catalog.entries(promoted)) if name else None


def find_job(connection: sqlite3.Connection, account: str, job_id: str) -> JobRow:
    job = tables.job(connection, job_id)
    if job is None or job.account != account:
        raise NotFound(
            f"trainer job {job_id!r} does not exist in account {account!r}",
            hint="list the account's rlorTrainerJobs",
        )
    return job


def _require_room(capacity: Capacity, config: JobConfig) -> None:
    """FailedPrecondition for what no waiting would help."""
    if (lack := never_fits(capacity, config.need)) is None:
        return
    name = config.base_model.name
    if config.ranks == 1:
        raise FailedPrecondition(
            f"{name} cannot be trained here, {lack}",
            hint="use a smaller model or LoRA, or a larger machine",
        )
    raise FailedPrecondition(
        f"{name} cannot be trained here by {config.ranks} engine ranks, {lack}",
        hint="ask for fewer ranks, a smaller model or LoRA, or use a larger machine",
        field="trainingShape" if config.training_shape else COUNT_FIELD,
    )


def _refuse(request: TrainerJobRequest) -> None:
    """What would change the training and is not done here; and a duration that is none."""
    asked = request.training_config
    hosted = {
        "trainingConfig.extraArgs": asked.extra_args,
        "extraValues": request.extra_values,
    }
    for field, given in hosted.items():
        if given:
            raise Unsupported(
                f"{field} are arguments of the hosted service's trainer",
                hint=f"leave {field} out",
                field=field,
            )
    if asked.projection_head_dim:
        raise Unsupported(
            "a projection head (projectionHeadDim) is not supported",
            hint="leave trainingConfig.projectionHeadDim out",
            field="trainingConfig.projectionHeadDim",
        )
    if request.inactivity_timeout and not _DURATION.fullmatch(request.inactivity_timeout):
        raise InvalidArgument(
            f"inactivityTimeout {request.inactivity_timeout!r} is no duration",
            hint="write seconds, e.g. 1800s",
            field="inactivityTimeout",
        )


def _with_deployment(request: TrainerJobRequest, deployment_id: str | None) -> TrainerJobRequest:
    """Old clients name the deployment in the query."""
    if not deployment_id or request.hot_load_deployment_id:
        return request
    return msgspec.structs.replace(request, hot_load_deployment_id=deployment_id)


def _check_scope(connection: sqlite3.Connection, job: JobRow) -> None:
    """A deployment follows one trainer's bucket, or trainers write to the deployment's: not both."""
    named = job.config.request.hot_load_deployment_id
    if not named:
        return
    deployment_id = id_in(
        named, collection="deployments", account=job.account, field="hotLoadDeploymentId"
    )
    deployment = tables.deployment(connection, deployment_id)
    if deployment is not None and deployment.config.hot_load_trainer_job:
        raise InvalidArgument(
            f"hotload flow mismatch: deployment {deployment_id!r} follows trainer"
            f" {deployment.config.hot_load_trainer_job}, so no trainer can name it",
            hint="leave out hotLoadDeploymentId and set the deployment's hotLoadTrainerJob",
            field="hotLoadDeploymentId",
        )


def _mode(request: TrainerJobRequest, shape: Shape | None) -> tuple[TrainerMode, int]:
    rank = request.training_config.lora_rank or 0
    if not 0 <= rank <= LARGEST_LORA_RANK:
        raise InvalidArgument(
            f"loraRank {rank} is not between 0 and {LARGEST_LORA_RANK}",
            field="trainingConfig.loraRank",
        )
    by_shape = shape.mode if shape else None
    if request.forward_only or by_shape is TrainerMode.FORWARD_ONLY:
        return TrainerMode.FORWARD_ONLY, 0
    mode = TrainerMode.LORA if rank > 0 else TrainerMode.FULL
    if shape is not None and not shape.is_alias and shape.mode is not mode:
        raise InvalidArgument(
            f"loraRank {rank} does not fit training shape {shape.name}, which is {shape.mode}",
            hint="use loraRank 0 with a -full shape and a positive one with a -lora shape",
            field="trainingConfig.loraRank",
        )
    return mode, rank


def _context_length(asked: int | None, shape: Shape | None, model: BaseModel) -> int:
    if not asked:
        limit = shape.max_context_length if shape else None
        return min(limit or model.max_context_length, model.max_context_length)
    if not 0 < asked <= model.max_context_length:
        raise SequenceTooLong(
            f"maxContextLength {asked} is not between 1 and {model.max_context_length},"
            f" {model.context_limit}",
            field="trainingConfig.maxContextLength",
        )
    return asked
