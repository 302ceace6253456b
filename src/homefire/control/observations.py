"""What is observed of all processes: one watch per process, kept in step with the rows."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from homefire.control.db.rows import DeploymentRow, JobRow, ReplicaRow
from homefire.control.lifecycle import (
    SeenReplica,
    SeenTrainer,
    has_settled_weights,
)
from homefire.control.watch import Connect, Watch, replica_essence, trainer_essence
from homefire.control.world import ReplicaKey
from homefire.http.client import ServiceClient
from homefire.launch import Launcher, ProcessRecord
from homefire.wire.internal import ReplicaStatus, TrainerState, TrainerStatus
from homefire.wire.resources import JobState

Key = TypeVar("Key", str, ReplicaKey)


class Signals:
    """Which weights one replica process was told to load, and what came of telling it."""

    def __init__(self) -> None:
        self.generation: int | None = None
        self.at_version = 0
        self.refusal: str | None = None
        self.not_before = 0.0


class Observations:
    """Owned by the reconciler. The maps follow the rows: a new process gets a new watch."""

    def __init__(
        self,
        *,
        launcher: Launcher,
        connect: Connect,
        wake: Callable[[], None],
        pace_s: float,
    ) -> None:
        self._launcher = launcher
        self._connect = connect
        self._wake = wake
        self._pace_s = pace_s
        self._trainers: dict[str, Watch[TrainerStatus]] = {}
        self._replicas: dict[ReplicaKey, Watch[ReplicaStatus]] = {}
        self._signals: dict[ReplicaKey, Signals] = {}

    async def follow(self, jobs: Iterable[JobRow], replicas: Iterable[ReplicaRow]) -> None:
        """Starts the watches that are missing and closes those whose process is not wanted."""
        trainer_records = {job.id: job.supervision.process for job in jobs}
        replica_records = {(r.deployment, r.number): r.supervision.process for r in replicas}
        for job_id in _outdated(self._trainers, trainer_records):
            await self._trainers.pop(job_id).close()
        for key in _outdated(self._replicas, replica_records):
            await self._replicas.pop(key).close()
            self._signals.pop(key, None)
        for job_id, record in trainer_records.items():
            if record is not None and job_id not in self._trainers:
                self._trainers[job_id] = self._watch_trainer(record)
        for key, record in replica_records.items():
            if record is not None and key not in self._replicas:
                self._replicas[key] = self._watch_replica(record)
                self._signals[key] = Signals()

    def trainer(self, job: JobRow) -> SeenTrainer:
        watch = self._trainers.get(job.id)
        if watch is None:
            return SeenTrainer()
        status = watch.status
        quiet = job.state is JobState.RUNNING and status and status.state is TrainerState.READY
        watch.set_urgent(not quiet)
        return SeenTrainer(ended=watch.ended, status=status)

    def replica(self, deployment: DeploymentRow, number: int) -> SeenReplica:
        key = (deployment.id, number)
        watch = self._replicas.get(key)
        if watch is None:
            return SeenReplica()
        signals = self._signals[key]
        seen = SeenReplica(
            ended=watch.ended,
            status=watch.status,
            signalled=signals.generation,
            signalled_at_version=signals.at_version,
            refusal=signals.refusal,
            signal_after=signals.not_before,
        )
        watch.set_urgent(not has_settled_weights(deployment.desired, seen))
        return seen

    def expect_end_of_trainer(self, job_id: str) -> None:
        """The trainer is being stopped."""
        if (watch := self._trainers.get(job_id)) is not None:
            watch.stop_following()

    def expect_end_of_replica(self, key: ReplicaKey) -> None:
        """The replica is being stopped."""
        if (watch := self._replicas.get(key)) is not None:
            watch.stop_following()

    def replica_watch(self, key: ReplicaKey) -> tuple[Watch[ReplicaStatus], Signals] | None:
        watch = self._replicas.get(key)
        return None if watch is None else (watch, self._signals[key])

    def trainer_client(self, job_id: str) -> ServiceClient | None:
        """To speak to a trainer that proved itself and has not ended."""
        watch = self._trainers.get(job_id)
        if watch is None or watch.status is None or watch.ended is not None:
            return None
        return watch.client

    async def refresh(self) -> None:
        """Statuses change their counts all the time without waking us; this brings them up to date."""
        watches = [*self._trainers.values(), *self._replicas.values()]
        await asyncio.gather(*(watch.refresh() for watch in watches))

    async def refresh_trainer(self, job_id: str) -> None:
        """How far a recovery has come wakes nobody; who asks wants to know."""
        watch = self._trainers.get(job_id)
        if watch is not None and watch.status and watch.status.state is not TrainerState.READY:
            await watch.refresh()

    async def close(self) -> None:
        watches = [*self._trainers.values(), *self._replicas.values()]
        await asyncio.gather(*(watch.close() for watch in watches))
        self._trainers.clear()
        self._replicas.clear()

    def _watch_trainer(self, record: ProcessRecord) -> Watch[TrainerStatus]:
        return Watch(
            record,
            kind=TrainerStatus,
            significant=trainer_essence,
            launcher=self._launcher,
            connect=self._connect,
            wake=self._wake,
            pace_s=self._pace_s,
        )

    def _watch_replica(self, record: ProcessRecord) -> Watch[ReplicaStatus]:
        return Watch(
            record,
            kind=ReplicaStatus,
            significant=replica_essence,
            launcher=self._launcher,
            connect=self._connect,
            wake=self._wake,
            pace_s=self._pace_s,
        )


def _outdated(
    watches: Mapping[Key, Watch[Any]], records: Mapping[Key, ProcessRecord | None]
) -> list[Key]:
    """Keys of watches whose process is not the one of the row any more."""
    wanted = {key: record.nonce for key, record in records.items() if record is not None}
    return [key for key, watch in watches.items() if wanted.get(key) != watch.record.nonce]
