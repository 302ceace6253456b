"""The job's transition table and what is decided from it; no process, no database."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from homefire.control.db.rows import BaseModel, JobConfig, JobRow, Need, Supervision
from homefire.control.lifecycle import (
    JOB_ALREADY,
    JOB_ENDED,
    JOB_IN_TRANSITION,
    JOB_LIVE,
    JOB_TRANSITIONS,
    Admit,
    Advance,
    Bury,
    JobEvent,
    Launch,
    MarkReady,
    SeenTrainer,
    Stop,
    WaitUntil,
    decide_job,
    job_after,
)
from homefire.control.supervision import CRASH_LIMIT
from homefire.foundation.process import ProcessId
from homefire.launch import ProcessRecord
from homefire.wire.errors import EngineFailed, ErrorRecord, FailedPrecondition
from homefire.wire.internal import TrainerState, TrainerStatus
from homefire.wire.resources import JobState, TrainerJobRequest
from homefire.wire.specs import TrainerMode, Upstream

NOW = 1000.0
NEVER_ENTERED = {
    JobState.UNSPECIFIED,
    JobState.WRITING_RESULTS,
    JobState.VALIDATING,
    JobState.DELETING_CLEANING_UP,
    JobState.EXPIRED,
    JobState.RE_QUEUEING,
    JobState.CREATING_INPUT_DATASET,
    JobState.IDLE,
    JobState.ARCHIVED,
}
STORED = [state for state in JobState if state not in NEVER_ENTERED]
RECORD = ProcessRecord(
    name="trainer j1",
    nonce="n",
    listen=Upstream("s", "x"),
    spec_file="spec.json",
    log_file="log",
    process=ProcessId(1, 1),
    boot="b",
    started_at=0.0,
)

MakeJob = Callable[..., JobRow]


@pytest.fixture
def make_job() -> MakeJob:
    def make(state: JobState, **supervision: Any) -> JobRow:
        model = BaseModel(name="m", directory="/m", tokenizer_id="/m", max_context_length=8)
        config = JobConfig(
            request=TrainerJobRequest(),
            training_shape=None,
            base_model=model,
            mode=TrainerMode.FULL,
            lora_rank=0,
            max_context_length=8,
            need=Need(1, 1),
        )
        return JobRow(
            id="j1",
            account="local",
            state=state,
            message="",
            config=config,
            supervision=Supervision(**supervision),
            created_at=0.0,
            updated_at=0.0,
        )

    return make


def status(state: TrainerState, **fields: Any) -> TrainerStatus:
    return TrainerStatus(version=1, nonce="n", state=state, **fields)


@pytest.mark.parametrize(("state", "event"), list(itertools.product(JobState, JobEvent)))
def test_every_pair_of_state_and_event_is_a_transition_or_a_named_refusal(
    make_job: MakeJob, state: JobState, event: JobEvent
) -> None:
    job = make_job(state)
    if (state, event) in JOB_TRANSITIONS:
        assert job_after(job, event) is JOB_TRANSITIONS[state, event]
    else:
        with pytest.raises(FailedPrecondition, match=f"cannot {event} job in state: {state}"):
            job_after(job, event)


def test_states_of_the_hosted_service_that_mean_nothing_here_are_never_entered() -> None:
    assert NEVER_ENTERED.isdisjoint(JOB_TRANSITIONS.values())


def test_what_is_so_already_is_not_also_a_transition() -> None:
    assert JOB_ALREADY.isdisjoint(JOB_TRANSITIONS)


def test_nothing_leads_out_of_a_tombstone_but_a_new_model_of_the_root_plane() -> None:
    events = [event for state, event in JOB_TRANSITIONS if state is JobState.DELETED]
    assert events == [JobEvent.REVIVE]


def test_every_stored_state_leads_to_a_tombstone_when_the_user_deletes() -> None:
    for state in STORED:
        reached = JOB_TRANSITIONS.get((state, JobEvent.DELETE), state)
        assert reached in (JobState.DELETING, JobState.DELETED), state


@pytest.mark.parametrize(
    "state",
    [JobState.FAILED, JobState.CANCELLED, JobState.PAUSED, JobState.COMPLETED],
)
def test_a_job_that_stopped_can_be_resumed(state: JobState) -> None:
    assert JOB_TRANSITIONS[state, JobEvent.RESUME] is JobState.PENDING


def test_every_state_that_a_job_can_stay_in_is_ended_running_or_paused() -> None:
    resting = {JobState.RUNNING, JobState.PAUSED} | JOB_ENDED
    assert resting | JOB_IN_TRANSITION == set(STORED)
    assert resting.isdisjoint(JOB_IN_TRANSITION)


@pytest.mark.parametrize("state", sorted(JOB_LIVE))
def test_a_live_job_without_a_process_is_started(make_job: MakeJob, state: JobState) -> None:
    assert decide_job(make_job(state), SeenTrainer(), now=NOW) == Launch()


def test_a_start_waits_for_the_end_of_its_back_off(make_job: MakeJob) -> None:
    job = make_job(JobState.RUNNING, restarts=2, not_before=NOW + 1)
    assert decide_job(job, SeenTrainer(), now=NOW) == WaitUntil(NOW + 1)
    assert decide_job(job, SeenTrainer(), now=NOW + 1) == Launch()


def test_a_trainer_that_died_too_often_fails_its_job_and_says_how_it_died(
    make_job: MakeJob,
) -> None:
    job = make_job(JobState.RUNNING, restarts=CRASH_LIMIT, failure="exited with 1:\nno memory")
    action = decide_job(job, SeenTrainer(), now=NOW)
    assert isinstance(action, Advance)
    assert action.event is JobEvent.FAILED
    assert "5 times in a row" in action.message
    assert "no memory" in action.message


@pytest.mark.parametrize("state", STORED)
def test_a_dead_process_is_buried_in_every_state(make_job: MakeJob, state: JobState) -> None:
    job = make_job(state, process=RECORD)
    assert decide_job(job, SeenTrainer(ended="exited with 1"), now=NOW) == Bury("exited with 1")


@pytest.mark.parametrize("state", sorted(set(STORED) - JOB_LIVE))
def test_a_process_of_a_job_that_is_not_live_is_stopped(make_job: MakeJob, state: JobState) -> None:
    assert decide_job(make_job(state, process=RECORD), SeenTrainer(), now=NOW) == Stop()


@pytest.mark.parametrize("state", [JobState.CANCELLING, JobState.DELETING])
def test_stopping_is_over_when_the_process_has_gone(make_job: MakeJob, state: JobState) -> None:
    assert decide_job(make_job(state), SeenTrainer(), now=NOW) == Advance(JobEvent.STOPPED)


def test_a_pending_job_asks_for_room(make_job: MakeJob) -> None:
    assert decide_job(make_job(JobState.PENDING), SeenTrainer(), now=NOW) == Admit()


@pytest.mark.parametrize("state", sorted(JOB_ENDED | {JobState.PAUSED}))
def test_a_job_at_rest_needs_nothing(make_job: MakeJob, state: JobState) -> None:
    assert decide_job(make_job(state), SeenTrainer(), now=NOW) is None


def test_a_ready_trainer_is_noted_and_then_its_job_runs(make_job: MakeJob) -> None:
    seen = SeenTrainer(status=status(TrainerState.READY))
    job = make_job(JobState.CREATING, process=RECORD)
    assert decide_job(job, seen, now=NOW) == MarkReady()
    noted = msgspec.structs.replace(job, supervision=Supervision(process=RECORD, ready_at=NOW))
    assert decide_job(noted, seen, now=NOW) == Advance(JobEvent.READY)
    running = msgspec.structs.replace(noted, state=JobState.RUNNING)
    assert decide_job(running, seen, now=NOW) is None


@pytest.mark.parametrize(
    "state", [TrainerState.STARTING, TrainerState.RECOVERING, TrainerState.STOPPING]
)
def test_a_trainer_that_is_not_ready_yet_is_waited_for(
    make_job: MakeJob, state: TrainerState
) -> None:
    job = make_job(JobState.CREATING, process=RECORD)
    assert decide_job(job, SeenTrainer(status=status(state)), now=NOW) is None


def test_a_trainer_that_says_it_cannot_run_fails_its_job_with_its_words(
    make_job: MakeJob,
) -> None:
    error = ErrorRecord.of(EngineFailed("the model does not fit"))
    seen = SeenTrainer(status=status(TrainerState.FAILED, error=error))
    job = make_job(JobState.CREATING, process=RECORD)
    assert decide_job(job, seen, now=NOW) == Advance(JobEvent.FAILED, "the model does not fit")
