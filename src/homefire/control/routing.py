"""The gateway's routing table, computed from the rows and what is observed. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from homefire.control.db.rows import DeploymentRow, JobRow, ReplicaRow
from homefire.control.lifecycle import (
    DEPLOYMENT_LIVE,
    SeenReplica,
    SeenTrainer,
    hot_load_error,
    is_asleep,
)
from homefire.wire.internal import DeploymentRoute, KeyRoute, RouteTable, TrainerRoute
from homefire.wire.pooled import is_sampler
from homefire.wire.resources import DeploymentState, JobState


def route_table(
    *,
    version: int,
    keys: Sequence[KeyRoute],
    jobs: Sequence[JobRow],
    deployments: Sequence[DeploymentRow],
    replicas: Sequence[ReplicaRow],
    trainers_seen: Mapping[str, SeenTrainer],
    replicas_seen: Mapping[tuple[str, int], SeenReplica],
) -> RouteTable:
    live_jobs = [job for job in jobs if job.state is not JobState.DELETED]
    known = [row for row in deployments if row.state is not DeploymentState.DELETED]
    return RouteTable(
        version=version,
        keys=list(keys),
        trainers={
            f"{job.account}/{job.id}": trainer_route(job, trainers_seen.get(job.id))
            for job in live_jobs
        },
        deployments={
            f"{row.account}/{row.id}": deployment_route(row, replicas, replicas_seen)
            for row in known
        },
        models=_models(known),
    )


def trainer_route(job: JobRow, seen: SeenTrainer | None) -> TrainerRoute:
    """A trainer is reachable as soon as it proved itself, also while it loads or recovers."""
    record = job.supervision.process
    reachable = seen is not None and seen.ended is None and _has_proved_itself(job, seen)
    upstream = record.listen if record is not None and reachable else None
    return TrainerRoute(job.state.value, upstream, job.message)


def _has_proved_itself(job: JobRow, seen: SeenTrainer) -> bool:
    """Now, or to an earlier control plane: a restart of control must not take routes away."""
    return seen.status is not None or job.supervision.ready_at is not None


def deployment_route(
    deployment: DeploymentRow,
    replicas: Sequence[ReplicaRow],
    seen: Mapping[tuple[str, int], SeenReplica],
) -> DeploymentRoute:
    own = [replica for replica in replicas if replica.deployment == deployment.id]
    serving = [
        replica.supervision.process.listen
        for replica in own
        if replica.supervision.process is not None
        and replica.supervision.process.listen is not None
        and is_routable(replica, seen.get((deployment.id, replica.number)))
    ]
    detail = deployment.message or _why_silent(deployment, own, seen)
    return DeploymentRoute(
        deployment.state.value,
        serving,
        "" if serving else detail,
        is_asleep=not serving and is_asleep(deployment),
    )


def is_routable(replica: ReplicaRow, seen: SeenReplica | None) -> bool:
    """A replica that has not caught up yet would serve other weights than the caller synced."""
    if seen is None or seen.ended is not None or replica.leaving:
        return False
    return replica.supervision.caught_up and (seen.status is None or seen.status.ready)


def _why_silent(
    deployment: DeploymentRow,
    replicas: Sequence[ReplicaRow],
    seen: Mapping[tuple[str, int], SeenReplica],
) -> str:
    if is_asleep(deployment):
        return "scaled to zero replicas; a request starts one"
    if deployment.state in DEPLOYMENT_LIVE and deployment.config.num_replicas == 0:
        return "scaled to zero replicas; raise maxReplicaCount to serve again"
    for replica in replicas:
        view = seen.get((replica.deployment, replica.number), SeenReplica())
        error = hot_load_error(deployment.desired, view)
        if error is not None:
            return f"replica {replica.number} could not load {deployment.desired.identity}: {error}"
    return "its replicas are starting"


def _models(deployments: Sequence[DeploymentRow]) -> dict[str, str]:
    """The names of base models that exactly one live deployment of their account serves.

    The sampler of a root job counts only where there is no ordinary deployment.
    """
    live = [row for row in deployments if row.state in DEPLOYMENT_LIVE]
    samplers = _served_by_one([row for row in live if is_sampler(row.id)])
    ordinary = [row for row in live if not is_sampler(row.id)]
    taken = {name for row in ordinary for name in _model_names(row)}
    return {name: key for name, key in samplers.items() if name not in taken} | _served_by_one(
        ordinary
    )


def _served_by_one(deployments: Sequence[DeploymentRow]) -> dict[str, str]:
    count = Counter(name for row in deployments for name in _model_names(row))
    return {
        name: f"{row.account}/{row.id}"
        for row in deployments
        for name in _model_names(row)
        if count[name] == 1
    }


def _model_names(row: DeploymentRow) -> set[str]:
    """As it was asked for, its repository and its directory: what clients call a model."""
    model = row.config.base_model
    return {f"{row.account}/{name}" for name in (model.name, model.tokenizer_id, model.directory)}
