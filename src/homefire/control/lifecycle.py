"""The life of jobs and deployments: transitions as tables, and what to do next as pure functions.

`decide_job` and `decide_deployment` look at a row and at what is observed of its processes, and say
what to do; `reconcile` does it. They are asked again after everything that may have changed, so a
decision never has to be remembered: what is not done yet is decided again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from homefire.control.db.rows import DeploymentRow, DesiredWeights, JobRow, ReplicaRow, Supervision
from homefire.control.supervision import CRASH_LIMIT, gave_up
from homefire.wire.errors import FailedPrecondition
from homefire.wire.internal import HotLoadStage, ReplicaStatus, TrainerState, TrainerStatus
from homefire.wire.resources import DeploymentState, JobState


class JobEvent(StrEnum):
    """What can happen to a job."""

    ADMITTED = "admitted"
    """There is room, and it was reserved."""
    READY = "ready"
    """The trainer takes operations."""
    FAILED = "failed"
    """The trainer says that it cannot run, or died too often."""
    CANCEL = "cancel"
    """The user asked to stop it."""
    RESUME = "resume"
    """The user asked to go on, or a request came for a parked one."""
    PAUSE = "pause"
    """The user asked for its room; it goes on with the next operation, or when asked to."""
    PARK = "park"
    """Nobody used this trainer of the root plane for a while."""
    REVIVE = "revive"
    """A deleted trainer of the root plane is needed again."""
    DELETE = "delete"
    """The user asked to delete it."""
    STOPPED = "stopped"
    """Its process has gone."""


J, E = JobState, JobEvent

JOB_TRANSITIONS: dict[tuple[JobState, JobEvent], JobState] = {
    (J.PENDING, E.ADMITTED): J.CREATING,
    (J.PENDING, E.CANCEL): J.CANCELLED,
    (J.PENDING, E.DELETE): J.DELETING,
    (J.PENDING, E.PAUSE): J.PAUSED,
    (J.PENDING, E.PARK): J.PAUSED,
    (J.CREATING, E.READY): J.RUNNING,
    (J.CREATING, E.FAILED): J.FAILED,
    (J.CREATING, E.CANCEL): J.CANCELLING,
    (J.CREATING, E.PAUSE): J.PAUSED,
    (J.CREATING, E.DELETE): J.DELETING,
    (J.RUNNING, E.FAILED): J.FAILED,
    (J.RUNNING, E.CANCEL): J.CANCELLING,
    (J.RUNNING, E.DELETE): J.DELETING,
    (J.RUNNING, E.PAUSE): J.PAUSED,
    (J.RUNNING, E.PARK): J.PAUSED,
    (J.CANCELLING, E.STOPPED): J.CANCELLED,
    (J.CANCELLING, E.DELETE): J.DELETING,
    (J.CANCELLED, E.RESUME): J.PENDING,
    (J.CANCELLED, E.DELETE): J.DELETING,
    (J.FAILED, E.RESUME): J.PENDING,
    (J.FAILED, E.CANCEL): J.CANCELLED,
    (J.FAILED, E.DELETE): J.DELETING,
    (J.PAUSED, E.RESUME): J.PENDING,
    (J.PAUSED, E.CANCEL): J.CANCELLED,
    (J.PAUSED, E.DELETE): J.DELETING,
    (J.COMPLETED, E.RESUME): J.PENDING,
    (J.COMPLETED, E.DELETE): J.DELETING,
    (J.EARLY_STOPPED, E.RESUME): J.PENDING,
    (J.EARLY_STOPPED, E.DELETE): J.DELETING,
    (J.DELETING, E.STOPPED): J.DELETED,
    (J.DELETED, E.REVIVE): J.PENDING,
}
"""A pair that is missing cannot happen; asked for by a user, it is a FailedPrecondition."""

JOB_ALREADY: frozenset[tuple[JobState, JobEvent]] = frozenset(
    {
        (J.PENDING, E.RESUME),
        (J.CREATING, E.RESUME),
        (J.RUNNING, E.RESUME),
        (J.CANCELLING, E.CANCEL),
        (J.CANCELLED, E.CANCEL),
        (J.PAUSED, E.PAUSE),
        (J.DELETING, E.DELETE),
        (J.DELETED, E.DELETE),
    }
)
"""What a user asks for is so already: answered with the job as it is."""

JOB_IN_TRANSITION = frozenset({J.PENDING, J.CREATING, J.CANCELLING, J.DELETING})
JOB_LIVE = frozenset({J.CREATING, J.RUNNING})
"""A process is kept alive."""
JOB_ENDED = frozenset({J.COMPLETED, J.FAILED, J.CANCELLED, J.EARLY_STOPPED, J.DELETED})


class DeploymentEvent(StrEnum):
    """What can happen to a deployment."""

    SETTLED = "settled"
    """As many replicas as wanted are ready."""
    RESIZED = "resized"
    """The user changed how many replicas are wanted."""
    REATTACHED = "reattached"
    """The user made it follow another trainer."""
    FAILED = "failed"
    """A replica died too often and none is ready."""
    DELETE = "delete"
    """The user asked to delete it."""
    UNDELETE = "undelete"
    """The user wants the deleted deployment back."""
    STOPPED = "stopped"
    """Its last replica has gone."""


D, F = DeploymentState, DeploymentEvent

DEPLOYMENT_TRANSITIONS: dict[tuple[DeploymentState, DeploymentEvent], DeploymentState] = {
    (D.CREATING, F.SETTLED): D.READY,
    (D.CREATING, F.RESIZED): D.CREATING,
    (D.CREATING, F.REATTACHED): D.CREATING,
    (D.CREATING, F.FAILED): D.FAILED,
    (D.CREATING, F.DELETE): D.DELETING,
    (D.READY, F.RESIZED): D.UPDATING,
    (D.READY, F.REATTACHED): D.UPDATING,
    (D.READY, F.FAILED): D.FAILED,
    (D.READY, F.DELETE): D.DELETING,
    (D.UPDATING, F.SETTLED): D.READY,
    (D.UPDATING, F.RESIZED): D.UPDATING,
    (D.UPDATING, F.REATTACHED): D.UPDATING,
    (D.UPDATING, F.FAILED): D.FAILED,
    (D.UPDATING, F.DELETE): D.DELETING,
    (D.FAILED, F.RESIZED): D.CREATING,
    (D.FAILED, F.REATTACHED): D.CREATING,
    (D.FAILED, F.DELETE): D.DELETING,
    (D.DELETING, F.STOPPED): D.DELETED,
    (D.DELETED, F.UNDELETE): D.CREATING,
}

DEPLOYMENT_IN_TRANSITION = frozenset({D.CREATING, D.UPDATING, D.DELETING})
DEPLOYMENT_LIVE = frozenset({D.CREATING, D.READY, D.UPDATING})


def is_asleep(deployment: DeploymentRow) -> bool:
    """Scaled to zero, and free to have a replica again: the next request starts one. A maximum of zero says
    that it shall stay so."""
    config = deployment.config
    is_live = deployment.state in DEPLOYMENT_LIVE
    return is_live and config.num_replicas == 0 and config.max_replica_count > 0


def job_after(job: JobRow, event: JobEvent) -> JobState:
    """The job's next state. Raises FailedPrecondition when the event cannot happen in its state."""
    try:
        return JOB_TRANSITIONS[job.state, event]
    except KeyError:
        raise FailedPrecondition(
            f"cannot {event} job in state: {job.state}", hint=f"job {job.id!r}: {job.message}"
        ) from None


def deployment_after(deployment: DeploymentRow, event: DeploymentEvent) -> DeploymentState:
    try:
        return DEPLOYMENT_TRANSITIONS[deployment.state, event]
    except KeyError:
        raise FailedPrecondition(
            f"deployment {deployment.id!r} cannot be {event} in state {deployment.state}"
        ) from None


# --- what is observed ---------------------------------------------------------------------------


@dataclass(frozen=True)
class SeenProcess:
    """What is observed of a process right now."""

    ended: str | None = None
    """How it ended; None while it runs, or when there is none."""


@dataclass(frozen=True)
class SeenTrainer(SeenProcess):
    status: TrainerStatus | None = None
    """None until it answered, with its nonce, over its own socket."""


@dataclass(frozen=True)
class SeenReplica(SeenProcess):
    status: ReplicaStatus | None = None
    signalled: int | None = None
    """Generation of the desired weights that this process was told of."""
    signalled_at_version: int = 0
    """Version of its status when it was told: an error of an older one is an old error."""
    refusal: str | None = None
    """Why it did not even begin to load what it was told."""
    signal_after: float = 0.0
    """It could not be told; not to be tried again before this Unix time."""


# --- what to do ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Advance:
    """The job's state changes."""

    event: JobEvent
    message: str = ""


@dataclass(frozen=True)
class Admit:
    """Reserve capacity for the job if there is room, else note why there is none."""


@dataclass(frozen=True)
class Launch:
    """Start the process."""


@dataclass(frozen=True)
class Stop:
    """Ask the process to end, in the background."""


@dataclass(frozen=True)
class Bury:
    """The process has ended: remember how, and when it may start again."""

    failure: str


@dataclass(frozen=True)
class MarkReady:
    """The process is ready for the first time."""


@dataclass(frozen=True)
class WaitUntil:
    """Nothing to do before this Unix time."""

    at: float


JobAction = Advance | Admit | Launch | Stop | Bury | MarkReady | WaitUntil


def decide_job(job: JobRow, seen: SeenTrainer, *, now: float) -> JobAction | None:
    """What to do for a job now; None when there is nothing to do until something changes."""
    process = job.supervision.process
    if process is not None and seen.ended is not None:
        return Bury(seen.ended)
    if job.state is J.PENDING:
        return Admit() if process is None else Stop()
    if job.state in JOB_LIVE:
        return _decide_live_job(job, seen, now=now)
    if process is not None:
        return Stop()
    if job.state in (J.CANCELLING, J.DELETING):
        return Advance(E.STOPPED)
    return None


def _decide_live_job(job: JobRow, seen: SeenTrainer, *, now: float) -> JobAction | None:
    supervision = job.supervision
    if supervision.process is None:
        if gave_up(supervision):
            return Advance(E.FAILED, crash_message("trainer", supervision))
        return _start(supervision, now=now)
    if seen.status is None:
        return None
    if seen.status.state is TrainerState.FAILED:
        error = seen.status.error
        return Advance(E.FAILED, error.message if error else seen.status.detail)
    if seen.status.state is not TrainerState.READY:
        return None
    if supervision.ready_at is None:
        return MarkReady()
    return Advance(E.READY) if job.state is J.CREATING else None


def _start(supervision: Supervision, *, now: float) -> Launch | WaitUntil:
    return Launch() if now >= supervision.not_before else WaitUntil(supervision.not_before)


def crash_message(what: str, supervision: Supervision) -> str:
    return f"the {what} died {CRASH_LIMIT} times in a row; the last time it {supervision.failure}"


@dataclass(frozen=True)
class AdvanceDeployment:
    """The deployment's state changes."""

    event: DeploymentEvent
    message: str = ""


@dataclass(frozen=True)
class AdmitReplica:
    """Reserve capacity for one more replica if there is room, else note why there is none."""

    number: int


@dataclass(frozen=True)
class OnReplica:
    """Do this to one replica's process."""

    number: int
    action: Launch | Stop | Bury | MarkReady


@dataclass(frozen=True)
class Dismiss:
    """The replica is not wanted any more."""

    number: int


@dataclass(frozen=True)
class RemoveReplica:
    """The dismissed replica's process has gone."""

    number: int


@dataclass(frozen=True)
class SignalHotLoad:
    """Tell the replica which weights it has to serve."""

    number: int


@dataclass(frozen=True)
class MarkCaughtUp:
    """The replica serves the desired weights: it may be routed to from now on."""

    number: int


DeploymentAction = (
    AdvanceDeployment
    | AdmitReplica
    | OnReplica
    | Dismiss
    | RemoveReplica
    | SignalHotLoad
    | MarkCaughtUp
    | WaitUntil
)


def decide_deployment(
    deployment: DeploymentRow,
    replicas: Sequence[ReplicaRow],
    seen: Mapping[int, SeenReplica],
    *,
    now: float,
) -> list[DeploymentAction]:
    """What to do for a deployment now: about its replicas first, then about itself."""
    wanted = deployment.config.num_replicas if deployment.state in DEPLOYMENT_LIVE else 0
    actions: list[DeploymentAction] = []
    for replica in replicas:
        view = seen.get(replica.number, SeenReplica())
        actions += _decide_replica(deployment, replica, view, wanted=wanted, now=now)
    taken = {replica.number for replica in replicas}
    actions += [AdmitReplica(number) for number in range(wanted) if number not in taken]
    return actions + _decide_state(deployment, replicas, wanted=wanted)


def _decide_replica(
    deployment: DeploymentRow, replica: ReplicaRow, seen: SeenReplica, *, wanted: int, now: float
) -> list[DeploymentAction]:
    number, supervision = replica.number, replica.supervision
    if supervision.process is not None and seen.ended is not None:
        return [OnReplica(number, Bury(seen.ended))]
    if replica.leaving:
        stopping = supervision.process is not None
        return [OnReplica(number, Stop()) if stopping else RemoveReplica(number)]
    if number >= wanted:
        return [Dismiss(number)]
    if supervision.process is None:
        if gave_up(supervision):
            return []
        start = _start(supervision, now=now)
        return [start if isinstance(start, WaitUntil) else OnReplica(number, start)]
    if seen.status is None or not seen.status.ready:
        return []
    if supervision.ready_at is None:
        return [OnReplica(number, MarkReady())]
    return _decide_weights(deployment.desired, replica, seen, seen.status, now=now)


def _decide_weights(
    desired: DesiredWeights,
    replica: ReplicaRow,
    seen: SeenReplica,
    status: ReplicaStatus,
    *,
    now: float,
) -> list[DeploymentAction]:
    if serves(desired, status):
        return [] if replica.supervision.caught_up else [MarkCaughtUp(replica.number)]
    if seen.signalled == desired.generation:
        return []
    if now < seen.signal_after:
        return [WaitUntil(seen.signal_after)]
    return [SignalHotLoad(replica.number)]


def serves(desired: DesiredWeights, status: ReplicaStatus) -> bool:
    """By digest too: an identity is a name, and names repeat between jobs."""
    is_loading = status.stage in (HotLoadStage.LOADING, HotLoadStage.DRAINING)
    is_same = status.identity == desired.identity and desired.digest in ("", status.digest)
    return is_same and not is_loading


def _decide_state(
    deployment: DeploymentRow, replicas: Sequence[ReplicaRow], *, wanted: int
) -> list[DeploymentAction]:
    if deployment.state is D.DELETING:
        return [] if replicas else [AdvanceDeployment(F.STOPPED)]
    if deployment.state not in DEPLOYMENT_LIVE:
        return []
    serving = [replica for replica in replicas if replica.supervision.caught_up]
    dead = [replica for replica in replicas if gave_up(replica.supervision)]
    if dead and not serving:
        message = crash_message("replica", dead[0].supervision)
        return [AdvanceDeployment(F.FAILED, message)]
    complete = len(serving) + len(dead) == wanted == len(replicas)
    message = "" if wanted else deployment.message  # why there are none
    if deployment.state is D.UPDATING and complete:
        return [AdvanceDeployment(F.SETTLED, message)]
    if deployment.state is D.CREATING and (complete or serving):
        return [AdvanceDeployment(F.SETTLED, message)]
    return []


def hot_load_error(desired: DesiredWeights, seen: SeenReplica) -> str | None:
    """Why the replica does not take the desired weights; None while it may still do."""
    status = seen.status
    told = seen.signalled == desired.generation
    if told and seen.refusal is not None:
        return seen.refusal
    if status is None or status.stage is not HotLoadStage.ERROR:
        return None
    is_new = status.version > seen.signalled_at_version
    about_this = status.target == desired.identity
    return (status.error or "the load failed") if told and is_new and about_this else None


def has_settled_weights(desired: DesiredWeights, seen: SeenReplica) -> bool:
    """The replica serves the desired weights, or has failed to take them."""
    status = seen.status
    if status is None or not status.ready:
        return False
    if hot_load_error(desired, seen) is not None:
        return True
    return serves(desired, status)
