"""The loop that makes what is into what is wanted.

Level-triggered: every pass looks at all rows and at all that is observed, and does what `lifecycle`
decides. It sleeps until something wakes it (a request changed a row, a process said something new
or ended) or a back-off is over. No network call is made inside a transaction.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from homefire.control.capacity import Capacity, Ledger
from homefire.control.db import tables
from homefire.control.db.database import Database
from homefire.control.db.rows import DeploymentRow, JobRow, ReplicaRow, Supervision
from homefire.control.lifecycle import (
    JOB_ENDED,
    Action,
    Admit,
    AdmitReplica,
    Advance,
    AdvanceDeployment,
    Bury,
    DeploymentAction,
    Dismiss,
    JobEvent,
    Launch,
    MarkCaughtUp,
    MarkReady,
    OnReplica,
    RemoveReplica,
    SeenReplica,
    SeenTrainer,
    SignalHotLoad,
    Stop,
    WaitUntil,
    decide_deployment,
    decide_job,
    deployment_after,
    job_after,
)
from homefire.control.observations import Observations, ReplicaKey
from homefire.control.processes import ProcessPlan
from homefire.control.supervision import (
    after_catching_up,
    after_clean_stop,
    after_death,
    after_ready,
    after_start,
)
from homefire.foundation.clock import Clock
from homefire.foundation.failpoints import failpoint
from homefire.foundation.versioned import Versioned
from homefire.launch import Launcher, ProcessRecord, ProcessSpec
from homefire.wire.errors import HomefireError, UserError
from homefire.wire.internal import HotLoadRequest, KeyRoute, ReplicaStatus
from homefire.wire.resources import DeploymentState

log = logging.getLogger(__name__)
_SIGNAL_AGAIN_S = 0.5
_SIGNAL_TIMEOUT_S = 5.0
_AFTER_FAILURE_S = 1.0
_TAIL_LINES = 12


@dataclass(frozen=True)
class World:
    """All rows at one moment."""

    keys: list[KeyRoute]
    jobs: list[JobRow]
    deployments: list[DeploymentRow]
    replicas: list[ReplicaRow]

    def replicas_of(self, deployment: DeploymentRow) -> list[ReplicaRow]:
        return [row for row in self.replicas if row.deployment == deployment.id]


@dataclass(frozen=True)
class Picture:
    """The rows and what was observed with them."""

    world: World
    trainers: dict[str, SeenTrainer]
    replicas: dict[ReplicaKey, SeenReplica]


@dataclass(frozen=True)
class ReconcilerConfig:
    """How patient control is with its processes."""

    stop_grace_s: float = 60.0
    """Between SIGTERM and SIGKILL: a trainer writes a recovery point meanwhile."""
    status_pace_s: float = 1.0
    """How often a process is asked while nothing is expected of it."""


class Reconciler:
    """One per control plane. `wake` may be called at any time; everything else is its own."""

    def __init__(
        self,
        *,
        database: Database,
        launcher: Launcher,
        observations: Observations,
        plan: ProcessPlan,
        capacity: Capacity,
        clock: Clock,
        config: ReconcilerConfig,
        publish: Callable[[Picture], Awaitable[None]],
        woken: asyncio.Event,
    ) -> None:
        self._database = database
        self._launcher = launcher
        self._observations = observations
        self._plan = plan
        self._capacity = capacity
        self._clock = clock
        self._config = config
        self._publish = publish
        self._woken = woken
        self._stopping: dict[str, asyncio.Task[None]] = {}
        self.passes: Versioned[int] = Versioned(0)
        """Counts passes; held requests look again after each."""

    def wake(self) -> None:
        self._woken.set()

    async def run(self) -> None:
        """Runs until cancelled."""
        await self.adopt()
        while True:
            self._woken.clear()
            try:
                due = await self.reconcile()
            except Exception:  # noqa: BLE001  # the worker loop: one bad pass must not end them all
                # A full disk, for one; what was not done is decided again.
                log.exception("a pass failed")
                due = self._clock.now() + _AFTER_FAILURE_S
            await self._sleep(until=due)

    async def adopt(self) -> None:
        """Finds the processes whose start was intended but not written down (a killed control)."""
        world = await self._database.transact(read_world)
        for job in world.jobs:
            if (record := _unfinished_start(job.supervision)) is not None:
                found = await self._launcher.find(record)
                await self._write_job(job.id, lambda s, found=found: self._adopted(s, found))
        for replica in world.replicas:
            if (record := _unfinished_start(replica.supervision)) is not None:
                found = await self._launcher.find(record)
                await self._write_replica(replica, lambda s, found=found: self._adopted(s, found))

    async def reconcile(self) -> float | None:
        """One pass. Returns when to look again though nothing happened; None: not before."""
        await self._follow()
        picture = await self.look()
        changed, due = await self._act(picture)
        await self._publish(await self.look() if changed else picture)
        self.passes.set(self.passes.get() + 1)
        if changed:
            self.wake()
        return due

    async def stop_all(self) -> None:
        """A clean stop: every process ends, every row stays as the next start resumes it."""
        await self._observations.close()
        world = await self._database.transact(read_world)
        stops = [self._stop_trainer(job) for job in world.jobs]
        stops += [self._stop_replica(replica) for replica in world.replicas]
        await asyncio.gather(*stops, *self._stopping.values())

    async def look(self) -> Picture:
        """All rows and all that is observed, now."""
        world = await self._database.transact(read_world)
        deployments = {row.id: row for row in world.deployments}
        return Picture(
            world,
            {job.id: self._observations.trainer(job) for job in world.jobs},
            {
                (r.deployment, r.number): self._observations.replica(
                    deployments[r.deployment], r.number
                )
                for r in world.replicas
            },
        )

    async def _follow(self) -> None:
        world = await self._database.transact(read_world)
        await self._observations.follow(world.jobs, world.replicas)

    async def _act(self, picture: Picture) -> tuple[bool, float | None]:
        """Does what is decided. Says whether anything changed, and when the next thing is due."""
        now, changed, due = self._clock.now(), False, list[float]()
        for job in picture.world.jobs:
            action = decide_job(job, picture.trainers[job.id], now=now)
            if isinstance(action, WaitUntil):
                due.append(action.at)
            elif action is not None:
                changed |= await self._act_on_job(job, action)
        for deployment in picture.world.deployments:
            replicas = picture.world.replicas_of(deployment)
            seen = {r.number: picture.replicas[deployment.id, r.number] for r in replicas}
            for action in decide_deployment(deployment, replicas, seen, now=now):
                if isinstance(action, WaitUntil):
                    due.append(action.at)
                else:
                    changed |= await self._act_on_deployment(deployment, replicas, action)
        return changed, min(due, default=None)

    async def _sleep(self, *, until: float | None) -> None:
        timeout = None if until is None else max(0.0, until - self._clock.now())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._woken.wait()

    # --- jobs ---------------------------------------------------------------------------------

    async def _act_on_job(self, job: JobRow, action: Action) -> bool:
        match action:
            case Advance(event, message):
                return await self._advance_job(job, event, message)
            case Admit():
                return await self._admit_job(job)
            case Launch():
                return await self._launch_trainer(job)
            case Stop():
                return self._stop_in_background(f"job/{job.id}", job.supervision)
            case Bury(failure):
                tail = await self._tail(job.supervision)
                await self._write_job(job.id, self._death(failure + tail))
            case MarkReady():
                now = self._clock.now()
                await self._write_job(job.id, lambda s: after_ready(s, now=now))
            case WaitUntil():
                return False
        return True

    async def _advance_job(self, job: JobRow, event: JobEvent, message: str) -> bool:
        to, now = job_after(job, event), self._clock.now()
        completed_at = now if to in JOB_ENDED else None

        def work(connection: sqlite3.Connection) -> bool:
            return tables.advance_job(
                connection, job, to, message=message, now=now, completed_at=completed_at
            )

        log.info("job %s: %s -> %s %s", job.id, job.state, to, message)
        return await self._database.transact(work)

    async def _admit_job(self, job: JobRow) -> bool:
        now = self._clock.now()

        def work(connection: sqlite3.Connection) -> bool:
            reason = ledger_of(connection, self._capacity).shortfall(job.config.need)
            if reason is None:
                to = job_after(job, JobEvent.ADMITTED)
                return tables.advance_job(
                    connection, job, to, message="", now=now, completed_at=None
                )
            return reason != job.message and tables.note_job(connection, job, reason, now=now)

        return await self._database.transact(work)

    async def _launch_trainer(self, job: JobRow) -> bool:
        spec = self._plan.trainer(job)

        def intend(connection: sqlite3.Connection) -> bool:
            fresh = tables.job(connection, job.id)
            if fresh is None or fresh.state is not job.state or fresh.supervision.process:
                return False
            intended = after_start(fresh.supervision, self._intention(spec))
            tables.supervise_job(connection, job.id, intended)
            return True

        if await self._database.transact(intend):
            started = await self._start(spec)
            await self._write_job(job.id, started)
        return True

    async def _write_job(self, job_id: str, change: Callable[[Supervision], Supervision]) -> None:
        def work(connection: sqlite3.Connection) -> None:
            job = tables.job(connection, job_id)
            if job is not None:
                tables.supervise_job(connection, job_id, change(job.supervision))

        await self._database.transact(work)

    # --- deployments --------------------------------------------------------------------------

    async def _act_on_deployment(
        self, deployment: DeploymentRow, replicas: list[ReplicaRow], action: DeploymentAction
    ) -> bool:
        by_number = {replica.number: replica for replica in replicas}
        match action:
            case AdvanceDeployment():
                return await self._advance_deployment(deployment, action)
            case AdmitReplica(number):
                return await self._admit_replica(deployment, number)
            case OnReplica(number, process_action):
                return await self._act_on_replica(deployment, by_number[number], process_action)
            case Dismiss(number):
                await self._database.transact(
                    lambda connection: tables.leave_replica(connection, by_number[number])
                )
            case RemoveReplica(number):
                await self._database.transact(
                    lambda connection: tables.remove_replica(connection, by_number[number])
                )
            case SignalHotLoad(number):
                return await self._signal_hot_load(deployment, number)
            case MarkCaughtUp(number):
                await self._write_replica(by_number[number], after_catching_up)
            case WaitUntil():
                return False
        return True

    async def _advance_deployment(
        self, deployment: DeploymentRow, action: AdvanceDeployment
    ) -> bool:
        to, now = deployment_after(deployment, action.event), self._clock.now()

        def work(connection: sqlite3.Connection) -> bool:
            moved = tables.advance_deployment(
                connection, deployment, to, message=action.message, now=now
            )
            if moved and to is DeploymentState.DELETED and deployment.purge:
                tables.remove_deployment(connection, deployment.id)
            return moved

        log.info("deployment %s: %s -> %s %s", deployment.id, deployment.state, to, action.message)
        return await self._database.transact(work)

    async def _admit_replica(self, deployment: DeploymentRow, number: int) -> bool:
        now = self._clock.now()

        def work(connection: sqlite3.Connection) -> bool:
            reason = ledger_of(connection, self._capacity).shortfall(deployment.config.need)
            if reason is None:
                row = ReplicaRow(deployment=deployment.id, number=number, supervision=Supervision())
                tables.insert_replica(connection, row)
            message = reason or ""
            changed = message != deployment.message and tables.note_deployment(
                connection, deployment, message, now=now
            )
            return changed or reason is None

        return await self._database.transact(work)

    async def _act_on_replica(
        self,
        deployment: DeploymentRow,
        replica: ReplicaRow,
        action: Launch | Stop | Bury | MarkReady,
    ) -> bool:
        match action:
            case Launch():
                return await self._launch_replica(deployment, replica)
            case Stop():
                key = f"replica/{replica.deployment}/{replica.number}"
                return self._stop_in_background(key, replica.supervision)
            case Bury(failure):
                tail = await self._tail(replica.supervision)
                await self._write_replica(replica, self._death(failure + tail))
            case MarkReady():
                now = self._clock.now()
                await self._write_replica(replica, lambda s: after_ready(s, now=now))
        return True

    async def _launch_replica(self, deployment: DeploymentRow, replica: ReplicaRow) -> bool:
        spec = self._plan.replica(deployment, replica)

        def intend(connection: sqlite3.Connection) -> bool:
            fresh = tables.replica(connection, replica.deployment, replica.number)
            if fresh is None or fresh.leaving or fresh.supervision.process:
                return False
            intended = after_start(fresh.supervision, self._intention(spec))
            tables.supervise_replica(connection, replica.deployment, replica.number, intended)
            return True

        if await self._database.transact(intend):
            started = await self._start(spec)
            await self._write_replica(replica, started)
        return True

    async def _write_replica(
        self, replica: ReplicaRow, change: Callable[[Supervision], Supervision]
    ) -> None:
        key = (replica.deployment, replica.number)

        def work(connection: sqlite3.Connection) -> None:
            row = tables.replica(connection, *key)
            if row is not None:
                tables.supervise_replica(connection, *key, change(row.supervision))

        await self._database.transact(work)

    async def _signal_hot_load(self, deployment: DeploymentRow, number: int) -> bool:
        watched = self._observations.replica_watch((deployment.id, number))
        if watched is None or watched[0].status is None:
            return False
        watch, signals = watched
        at_version = watch.status.version if watch.status else 0
        desired = deployment.desired
        request = HotLoadRequest(
            identity=desired.identity,
            location=desired.location,
            reset_prompt_cache=desired.reset_prompt_cache,
            transition=desired.transition,
        )
        refusal: str | None = None
        try:
            async with asyncio.timeout(_SIGNAL_TIMEOUT_S):
                answer = await watch.client.post("/internal/hot_load", request, ReplicaStatus)
            watch.accept(answer)
        except UserError as exc:
            refusal = str(exc)
        except (HomefireError, TimeoutError) as exc:
            signals.not_before = self._clock.now() + _SIGNAL_AGAIN_S
            log.warning("replica %s/%d was not told: %s", deployment.id, number, exc)
            return True
        signals.generation, signals.at_version = desired.generation, at_version
        signals.refusal = refusal
        return True

    # --- processes ----------------------------------------------------------------------------

    def _intention(self, spec: ProcessSpec) -> ProcessRecord:
        return spec.record(process=None, boot="", started_at=self._clock.now())

    async def _start(self, spec: ProcessSpec) -> Callable[[Supervision], Supervision]:
        """Starts a process. Returns what that does to the supervision."""
        try:
            record = await self._launcher.start(spec)
        except HomefireError as exc:
            log.warning("%s was not started: %s", spec.name, exc)
            return self._death(str(exc))
        failpoint("control.after_start_before_record")
        log.info("%s runs as %s", spec.name, record.process)
        return lambda supervision: after_start(supervision, record)

    def _death(self, failure: str) -> Callable[[Supervision], Supervision]:
        now = self._clock.now()
        return lambda supervision: after_death(supervision, now=now, failure=failure)

    def _adopted(self, supervision: Supervision, found: ProcessRecord | None) -> Supervision:
        if found is not None:
            return after_start(supervision, found)
        failure = "was not started: control was killed meanwhile"
        return after_death(supervision, now=self._clock.now(), failure=failure)

    def _stop_in_background(self, key: str, supervision: Supervision) -> bool:
        record, known = supervision.process, self._stopping.get(key)
        if record is not None and (known is None or known.done()):
            self._stopping[key] = asyncio.create_task(self._stop(record))
        return False

    async def _stop(self, record: ProcessRecord) -> None:
        exit_ = await self._launcher.stop(record, grace_s=self._config.stop_grace_s)
        log.info("%s %s", record.name, exit_)
        self.wake()

    async def _stop_trainer(self, job: JobRow) -> None:
        if job.supervision.process is not None:
            await self._stop(job.supervision.process)
            await self._write_job(job.id, lambda _: after_clean_stop())

    async def _stop_replica(self, replica: ReplicaRow) -> None:
        if replica.supervision.process is not None:
            await self._stop(replica.supervision.process)
            await self._write_replica(replica, lambda _: after_clean_stop())

    async def _tail(self, supervision: Supervision) -> str:
        """The end of the process's log, for the message of a failure."""
        if supervision.process is None:
            return ""
        lines = await self._launcher.logs(supervision.process, lines=_TAIL_LINES)
        return ":\n" + "\n".join(lines) if lines else ""


def read_world(connection: sqlite3.Connection) -> World:
    return World(
        keys=tables.keys(connection),
        jobs=tables.jobs(connection),
        deployments=tables.deployments(connection),
        replicas=tables.replicas(connection),
    )


def ledger_of(connection: sqlite3.Connection, capacity: Capacity) -> Ledger:
    return Ledger.of(
        capacity,
        tables.jobs(connection),
        tables.deployments(connection),
        tables.replicas(connection),
    )


def _unfinished_start(supervision: Supervision) -> ProcessRecord | None:
    record = supervision.process
    return record if record is not None and record.process is None else None
