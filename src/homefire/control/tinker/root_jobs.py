"""The jobs behind the root plane: the pool of a base model, and the job of a full-parameter run.

Functions of a transaction. They are ordinary rows, which the reconciler turns into trainers; parked,
stopped, failed or deleted ones come back under their ids, with all that their journals hold.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from pathlib import Path

from homefire.control.capacity import Capacity, never_fits
from homefire.control.db import tables
from homefire.control.db.rows import BaseModel, JobConfig, JobRow, Supervision
from homefire.control.footprint import activation_budget, micro_batch_tokens, trainer_need
from homefire.control.lifecycle import JOB_TRANSITIONS, JobEvent, job_after
from homefire.control.supervision import after_request
from homefire.control.trainer_keeper import admit_if_room
from homefire.wire.errors import FailedPrecondition, Unavailable
from homefire.wire.pooled import pool_job_id, run_job_id
from homefire.wire.resources import JobState, TrainerJobRequest, TrainingConfig
from homefire.wire.specs import TrainerMode

MAX_POOLED_RANK = 256
"""Of one adapter; what a pool's memory is planned for."""
_LEAVING = frozenset({JobState.CANCELLING, JobState.DELETING})


@dataclass(frozen=True)
class RootJobs:
    capacity: Capacity

    def pool(self, account: str, model: BaseModel, *, now: float) -> JobRow:
        """As it would be created. Blocks on the disk."""
        return self._job(
            pool_job_id(account, model.directory), account, model, TrainerMode.LORA, now=now
        )

    def full_run(self, account: str, run: str, model: BaseModel, *, now: float) -> JobRow:
        """As it would be created. Blocks on the disk."""
        return self._job(run_job_id(account, run), account, model, TrainerMode.FULL, now=now)

    def ensure(self, connection: sqlite3.Connection, job: JobRow, *, now: float) -> JobRow:
        """The job of that id, alive or on its way; made, resumed or revived if need be.

        Raises Unavailable while a job of that id is being stopped or deleted.
        """
        found = tables.job(connection, job.id)
        if found is None:
            tables.insert_job(connection, job)
            admit_if_room(connection, job, self.capacity, now=now)
        else:
            self.start(connection, found, now=now)
        return _existing(connection, job.id)

    def start(self, connection: sqlite3.Connection, job: JobRow, *, now: float) -> None:
        """Whatever ended or parked it; a job that lives is left alone."""
        if job.state in _LEAVING:
            raise Unavailable(
                f"trainer job {job.id} is in state {job.state}", hint="retry in a second"
            )
        event = JobEvent.REVIVE if job.state is JobState.DELETED else JobEvent.RESUME
        if (job.state, event) in JOB_TRANSITIONS:
            self._move(connection, job, event, now=now)

    def wake(self, connection: sqlite3.Connection, job: JobRow, *, now: float) -> bool:
        """Only what was parked or paused; what a user cancelled stays so. Says whether it was."""
        if job.state is JobState.PAUSED:
            self._move(connection, job, JobEvent.RESUME, now=now)
            return True
        return False

    def _move(
        self, connection: sqlite3.Connection, job: JobRow, event: JobEvent, *, now: float
    ) -> None:
        to = job_after(job, event)
        tables.advance_job(connection, job, to, message="", now=now, completed_at=None)
        tables.supervise_job(connection, job.id, after_request(job.supervision))
        admit_if_room(connection, _existing(connection, job.id), self.capacity, now=now)

    def _job(
        self, job_id: str, account: str, model: BaseModel, mode: TrainerMode, *, now: float
    ) -> JobRow:
        directory = Path(model.directory)
        need = trainer_need(directory, mode)
        if (lack := never_fits(self.capacity, need)) is not None:
            raise FailedPrecondition(
                f"{model.name} cannot be trained here, {lack}",
                hint="use a smaller model, or a larger machine",
                field="base_model",
            )
        rank = MAX_POOLED_RANK if mode is TrainerMode.LORA else 0
        training = TrainingConfig(base_model=model.name, lora_rank=rank)
        return JobRow(
            id=job_id,
            account=account,
            state=JobState.PENDING,
            message="",
            config=JobConfig(
                request=TrainerJobRequest(
                    training_config=training, display_name=f"root plane: {model.name}"
                ),
                training_shape=None,
                base_model=model,
                mode=mode,
                lora_rank=rank,
                max_context_length=model.max_context_length,
                need=need,
                micro_batch_tokens=micro_batch_tokens(directory, need, self.capacity),
                activations=activation_budget(directory, need, self.capacity),
                pooled=True,
            ),
            supervision=Supervision(),
            created_at=now,
            updated_at=now,
        )


def _existing(connection: sqlite3.Connection, job_id: str) -> JobRow:
    job = tables.job(connection, job_id)
    assert job is not None  # rows of jobs are never removed
    return job
