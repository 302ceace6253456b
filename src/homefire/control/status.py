"""`GET /v1/homefire/status`: everything at a glance. Pure."""

from __future__ import annotations

from homefire import __version__
from homefire.control.capacity import Capacity, Ledger
from homefire.control.db.rows import DeploymentRow, JobRow, ReplicaRow
from homefire.control.lifecycle import SeenReplica, SeenTrainer, hot_load_error
from homefire.control.presentation import doing
from homefire.control.world import Picture
from homefire.wire.ids import deployment_name, job_name
from homefire.wire.internal import GraphStatus, HotLoadStage
from homefire.wire.records import (
    CapacityReport,
    DeploymentReport,
    JobReport,
    ReplicaReport,
    RunReport,
    StatusReport,
)
from homefire.wire.resources import DeploymentState, JobState


def status_report(
    picture: Picture,
    *,
    runs: list[RunReport],
    account: str,
    capacity: Capacity,
    home: str,
    url: str,
) -> StatusReport:
    world = picture.world
    jobs = [j for j in world.jobs if j.account == account and j.state is not JobState.DELETED]
    deployments = [
        d
        for d in world.deployments
        if d.account == account and d.state is not DeploymentState.DELETED
    ]
    return StatusReport(
        version=__version__,
        home=home,
        url=url,
        jobs=[_job(job, picture.trainers.get(job.id, SeenTrainer())) for job in jobs],
        deployments=[_deployment(row, picture) for row in deployments],
        capacity=_capacity(picture, capacity),
        runs=runs,
    )


def _job(job: JobRow, seen: SeenTrainer) -> JobReport:
    record, status = job.supervision.process, seen.status
    graphs = status.graphs if status else GraphStatus()
    return JobReport(
        name=job_name(job.account, job.id),
        state=job.state.value,
        message=job.message or doing(status),
        base_model=job.config.base_model.name,
        mode=job.config.mode.value,
        pid=record.process.pid if record and record.process else None,
        step=status.step if status else 0,
        num_accepted=status.num_accepted if status else 0,
        num_applied=status.num_applied if status else 0,
        num_unsaved=status.num_unsaved if status else 0,
        engine_restarts=status.engine_restarts if status else 0,
        restarts=job.supervision.restarts,
        ranks=job.config.ranks,
        detail=status.detail if status else "",
        held_graph_bytes=graphs.held_bytes,
        held_graph_budget_bytes=graphs.budget_bytes,
        num_graphs_reused=graphs.num_reused,
        num_graphs_recomputed=graphs.num_recomputed,
    )


def _deployment(deployment: DeploymentRow, picture: Picture) -> DeploymentReport:
    return DeploymentReport(
        name=deployment_name(deployment.account, deployment.id),
        state=deployment.state.value,
        message=deployment.message,
        base_model=deployment.config.base_model.name,
        desired_identity=deployment.desired.identity,
        replicas=[
            _replica(deployment, row, picture.replicas.get((row.deployment, row.number)))
            for row in picture.world.replicas_of(deployment)
        ],
    )


def _replica(
    deployment: DeploymentRow, replica: ReplicaRow, seen: SeenReplica | None
) -> ReplicaReport:
    record = replica.supervision.process
    seen = seen or SeenReplica()
    status = seen.status
    return ReplicaReport(
        replica=replica.number,
        pid=record.process.pid if record and record.process else None,
        ready=status is not None and status.ready,
        identity=status.identity if status else None,
        digest=status.digest if status else "",
        canary=status.canary.value if status else "",
        stage=status.stage.value if status else HotLoadStage.IDLE.value,
        error=hot_load_error(deployment.desired, seen) or "",
        running=status.running if status else 0,
        queued=status.queued if status else 0,
        restarts=replica.supervision.restarts,
    )


def _capacity(picture: Picture, capacity: Capacity) -> CapacityReport:
    world = picture.world
    ledger = Ledger.of(capacity, world.jobs, world.deployments, world.replicas)
    waiting = [job_name(job.account, job.id) for job in world.jobs if job.state is JobState.PENDING]
    waiting += [
        deployment_name(row.account, row.id)
        for row in world.deployments
        if row.state in (DeploymentState.CREATING, DeploymentState.UPDATING)
        and len(world.replicas_of(row)) < row.config.num_replicas
    ]
    return CapacityReport(
        threads_total=capacity.threads,
        threads_used=ledger.threads_used,
        memory_total_bytes=capacity.memory_bytes,
        memory_used_bytes=ledger.memory_used_bytes,
        waiting=waiting,
    )
