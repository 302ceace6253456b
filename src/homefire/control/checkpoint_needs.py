"""Why a checkpoint may not be deleted yet. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from homefire.control.db.rows import DeploymentRow, JobRow, ModelRow
from homefire.control.job_activity import StateLoad
from homefire.wire.checkpoint_paths import (
    CheckpointPath,
    is_checkpoint_path,
    parse_checkpoint_path,
    parse_cross_job_path,
)
from homefire.wire.errors import FailedPrecondition
from homefire.wire.ids import POLICY_SLOT, job_of_model
from homefire.wire.manifest import CheckpointFamily, Manifest
from homefire.wire.pooled import is_ephemeral
from homefire.wire.resources import DeploymentState, JobState

MAY_REPLAY = frozenset({JobState.CREATING, JobState.RUNNING, JobState.CANCELLING, JobState.FAILED})
"""Jobs whose journal may lead back to a state that was loaded since their last recovery point."""


@dataclass(frozen=True)
class Needs:
    """What rests on checkpoints at one moment."""

    deployments: Sequence[DeploymentRow]
    jobs: Sequence[JobRow]
    loads: Mapping[str, Sequence[StateLoad]] = field(default_factory=dict[str, Sequence[StateLoad]])
    """By job: the states that its recovery would load."""

    sampled_paths: frozenset[str] = frozenset()
    """What live sessions sample by path."""
    promoting: Sequence[ModelRow] = ()
    """Models that are being made of a snapshot."""
    live_runs: frozenset[str] = frozenset()
    """Runs of live sessions, which may sample their ephemeral snapshots."""

    def is_needed(self, manifest: Manifest) -> bool:
        """By anybody, so that it is not pruned. Its owner may delete what is only being sampled."""
        return self.refusal(manifest) is not None or self._is_sampled(manifest)

    def need(self, manifest: Manifest) -> str | None:
        """What rests on it, in words; its descendants are not looked at."""
        refusal = self.refusal(manifest)
        if refusal is not None:
            return refusal.message
        return "a live session samples it" if self._is_sampled(manifest) else None

    def refusal(self, manifest: Manifest) -> FailedPrecondition | None:
        """What stands against the deletion; a snapshot's descendants are not looked at."""
        if manifest.pinned:
            return FailedPrecondition(
                f"checkpoint {manifest.identity!r} is pinned",
                hint="unpin it first, with `homefire checkpoint unpin`",
            )
        match manifest.family:
            case CheckpointFamily.SAMPLER:
                return self._served(manifest) or self._promoted(manifest)
            case CheckpointFamily.STATE:
                return self._loaded(manifest)
            case CheckpointFamily.EXTERNAL:
                return None

    def jobs_that_load(self, manifest: Manifest) -> list[str]:
        """Those whose recovery would load this state."""
        return [
            job.id
            for job in self.jobs
            if job.account == manifest.account
            and job.state in MAY_REPLAY
            and any(_leads_to(load, job.id, manifest) for load in self.loads.get(job.id, ()))
        ]

    def _is_sampled(self, manifest: Manifest) -> bool:
        if manifest.family is not CheckpointFamily.SAMPLER:
            return False
        path = CheckpointPath(manifest.slot, manifest.family, manifest.identity)
        return str(path) in self.sampled_paths or (
            is_ephemeral(manifest.identity) and manifest.slot in self.live_runs
        )

    def _served(self, manifest: Manifest) -> FailedPrecondition | None:
        for deployment in self.deployments:
            desired = deployment.desired
            where = desired.location
            if (
                where is not None
                and (where.account, where.job, where.slot)
                == (manifest.account, manifest.job, manifest.slot)
                and desired.identity == manifest.identity
                and deployment.state not in {DeploymentState.DELETED, DeploymentState.DELETING}
            ):
                return FailedPrecondition(
                    f"snapshot {manifest.identity!r} is what deployment {deployment.id!r} serves",
                    hint="hot-load another snapshot, or delete the deployment",
                )
        return None

    def _promoted(self, manifest: Manifest) -> FailedPrecondition | None:
        """A chain is read from its end: its other links are parents of that."""
        for model in self.promoting:
            source = (model.account, model.source.job, POLICY_SLOT, model.source.checkpoint)
            if source == (manifest.account, manifest.job, manifest.slot, manifest.identity):
                return FailedPrecondition(
                    f"snapshot {manifest.identity!r} is being promoted to model {model.id!r}",
                    hint="wait for the promotion",
                )
        return None

    def _loaded(self, manifest: Manifest) -> FailedPrecondition | None:
        for job in self.jobs_that_load(manifest):
            return FailedPrecondition(
                f"state {manifest.identity!r} may be needed by job {job!r} to recover",
                hint="try again when its trainer runs, or cancel the job: it then keeps a recovery "
                "point of its own",
            )
        return None


def descendant_refusal(manifest: Manifest, others: Sequence[Manifest]) -> FailedPrecondition | None:
    """`others` are of the same job."""
    if manifest.family is not CheckpointFamily.SAMPLER:
        return None
    for other in others:
        if other.parent == manifest.identity and other.slot == manifest.slot:
            return FailedPrecondition(
                f"snapshot {manifest.identity!r} is the parent of {other.identity!r}",
                hint=f"delete {other.identity!r} first, or promote it and then delete it",
            )
    return None


def _leads_to(load: StateLoad, job: str, manifest: Manifest) -> bool:
    """Whether what `job` loaded is this state."""
    if (other := parse_cross_job_path(load.path)) is not None:
        where = (manifest.job, manifest.slot, manifest.identity)
        return (other.job, POLICY_SLOT, other.name) == where
    if not is_checkpoint_path(load.path):
        return (job, load.path) == (manifest.job, manifest.identity)
    path = parse_checkpoint_path(load.path)
    if (dedicated := job_of_model(path.run)) is not None:
        return (dedicated, path.name) == (manifest.job, manifest.identity)
    return (path.run, path.name) == (manifest.slot, manifest.identity)
