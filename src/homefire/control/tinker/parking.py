"""Parking: what nobody used for a while stops behind a recovery point and holds no capacity.

In use is what works, what has work waiting, and what a live session trains in or samples from. A
parked trainer or sampler keeps its id, its runs and its snapshots; the next request that names it
wakes it up. While something waits for room, a minute of silence is enough, and seconds where every
session is over.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import msgspec

from homefire.control.db import tables, tinker_tables
from homefire.control.db.database import Database
from homefire.control.db.rows import DeploymentRow, JobRow
from homefire.control.db.tinker_tables import LiveSession
from homefire.control.lifecycle import (
    DeploymentEvent,
    JobEvent,
    SeenReplica,
    deployment_after,
    job_after,
)
from homefire.control.observations import Observations
from homefire.control.tinker.sessions import HEARTBEAT_ROW_S, Sessions
from homefire.control.world import World
from homefire.foundation.clock import Clock
from homefire.wire.internal import TrainerStatus
from homefire.wire.pooled import job_of_sampler
from homefire.wire.resources import DeploymentState, JobState

_LOOKS_PER_IDLE_TIME = 4
CROWDED_IDLE_S = 60.0
"""Clients send a heartbeat every 10 s, so a live session is never idle for so long."""
CROWDED_FREE_S = 4.0
"""The same where no session is left that could come back."""
_PARKABLE = frozenset({JobState.PENDING, JobState.RUNNING})


@dataclass(frozen=True)
class Activity:
    """What a service has done so far, as a number that changes with every request."""

    count: int
    is_busy: bool


class Parking:
    """Called after every pass of the reconciler; it looks at the sessions a few times per idle time."""

    def __init__(
        self,
        *,
        database: Database,
        observations: Observations,
        sessions: Sessions,
        clock: Clock,
        idle_s: float,
    ) -> None:
        """`idle_s` 0: nothing is ever parked."""
        self._database = database
        self._observations = observations
        self._sessions = sessions
        self._clock = clock
        self._idle_s = idle_s
        self._counts: dict[str, int] = {}
        self._used_at: dict[str, float] = {}
        """Unix time at which each root job and sampler was last seen in use."""
        self._looked_at = float("-inf")

    async def park_idle(self, world: World) -> tuple[bool, float | None]:
        """Says whether something was parked, and when to look again."""
        now = self._clock.now()
        jobs = [job for job in world.jobs if job.config.pooled and job.state in _PARKABLE]
        samplers = [row for row in world.deployments if is_parkable_sampler(row)]
        if not self._idle_s or not (jobs or samplers):
            return False, None
        is_crowded = something_waits(world)
        patience = CROWDED_FREE_S if is_crowded else self._idle_s
        pause_s = min(patience, self._idle_s) / _LOOKS_PER_IDLE_TIME
        if now < self._looked_at + pause_s:
            return False, self._looked_at + pause_s
        self._looked_at = now
        heard = await self._note_use(world, jobs, samplers, now=now)

        def is_idle(service: str) -> bool:
            limit_s = self._limit_s(service, heard) if is_crowded else self._idle_s
            return now - self._used_at[service] >= limit_s

        idle_jobs = [job for job in jobs if is_idle(job.id)]
        idle_samplers = [row for row in samplers if is_idle(row.id)]
        if idle_jobs or idle_samplers:
            message = self._why_parked(is_crowded=is_crowded)
            await self._database.transact(
                lambda c: _park(c, idle_jobs, idle_samplers, message=message, now=now)
            )
        return bool(idle_jobs or idle_samplers), now + pause_s

    async def _note_use(
        self,
        world: World,
        jobs: Iterable[JobRow],
        samplers: Iterable[DeploymentRow],
        *,
        now: float,
    ) -> dict[str, float]:
        """When the unfinished sessions of each job and sampler were last heard of."""
        await self._observations.refresh()
        since = now - self._idle_s - HEARTBEAT_ROW_S
        live = await self._database.transact(lambda c: tinker_tables.live_sessions(c, since=since))
        heard = self._last_heard(live)
        for job in jobs:
            status = self._observations.trainer(job).status
            self._note(job.id, trainer_activity(status), job.updated_at, heard, now=now)
        for row in samplers:
            numbers = [replica.number for replica in world.replicas_of(row)]
            seen = [self._observations.replica(row, number) for number in numbers]
            self._note(row.id, replica_activity(seen), row.updated_at, heard, now=now)
        return heard

    def _last_heard(self, live: Iterable[LiveSession]) -> dict[str, float]:
        """Per job and per sampler: when one of its sessions was last heard of."""
        heard: dict[str, float] = {}
        for session in live:
            at = self._sessions.last_heard(session.session, session.heartbeat_at)
            heard[session.service] = max(heard.get(session.service, 0.0), at)
        return heard

    def _note(
        self,
        service: str,
        activity: Activity,
        changed_at: float,
        heard: Mapping[str, float],
        *,
        now: float,
    ) -> None:
        """A session of a job may sample its ephemeral saves, so it uses the job's sampler too."""
        is_used = activity.is_busy or activity.count != self._counts.get(service, activity.count)
        self._counts[service] = activity.count
        used_at = max(
            now if is_used else 0.0,
            changed_at,
            heard.get(service, 0.0),
            heard.get(job_of_sampler(service) or "", 0.0),
            self._used_at.get(service, 0.0),
        )
        self._used_at[service] = used_at

    def _limit_s(self, service: str, heard: Mapping[str, float]) -> float:
        """How long it may be idle while something waits for room."""
        is_awaited = service in heard or job_of_sampler(service) in heard
        return min(self._idle_s, CROWDED_IDLE_S if is_awaited else CROWDED_FREE_S)

    def _why_parked(self, *, is_crowded: bool) -> str:
        spoken = f"{self._idle_s / 60:g} min" if self._idle_s >= 60 else f"{self._idle_s:g} s"
        why = "something waits for its room" if is_crowded else f"nobody used it for {spoken}"
        return f"parked: {why}; the next request wakes it"


def something_waits(world: World) -> bool:
    """A trainer or a replica that is wanted finds no room."""
    pending = any(job.state is JobState.PENDING for job in world.jobs)
    return pending or any(
        row.state in (DeploymentState.CREATING, DeploymentState.UPDATING)
        and len(world.replicas_of(row)) < row.config.num_replicas
        for row in world.deployments
    )


def is_parkable_sampler(row: DeploymentRow) -> bool:
    is_settled = row.state in (DeploymentState.READY, DeploymentState.CREATING)
    return is_settled and bool(row.config.samples_job) and row.config.num_replicas > 0


def trainer_activity(status: TrainerStatus | None) -> Activity:
    if status is None:
        return Activity(0, is_busy=False)
    return Activity(
        status.num_accepted + status.num_applied,
        is_busy=status.num_accepted > status.num_applied,
    )


def replica_activity(replicas: Iterable[SeenReplica]) -> Activity:
    statuses = [seen.status for seen in replicas if seen.status is not None]
    return Activity(
        sum(status.version + status.num_asked for status in statuses),
        is_busy=any(status.running or status.queued for status in statuses),
    )


def _park(
    connection: sqlite3.Connection,
    jobs: Iterable[JobRow],
    samplers: Iterable[DeploymentRow],
    *,
    message: str,
    now: float,
) -> None:
    for job in jobs:
        to = job_after(job, JobEvent.PARK)
        tables.advance_job(connection, job, to, message=message, now=now, completed_at=None)
    for row in samplers:
        config = msgspec.structs.replace(row.config, num_replicas=0)
        if tables.configure_deployment(connection, row, config, now=now):
            to = deployment_after(row, DeploymentEvent.RESIZED)
            tables.advance_deployment(connection, row, to, message=message, now=now)
