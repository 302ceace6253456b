"""The way of the weights: a snapshot of the policy is saved, hot-loaded, and looked up."""

from __future__ import annotations

from typing import Any, Self

from homefire.quickstart.lab import Lab
from homefire.quickstart.policy import Policy
from homefire.quickstart.promises import promise
from homefire.quickstart.records import Snapshot
from homefire.sdk import FiretitanTrainingClient, TrainerJobManager, WeightSyncer


class Serving:
    def __init__(
        self, policy: Policy, syncer: WeightSyncer, jobs: TrainerJobManager, job_id: str
    ) -> None:
        self._policy = policy
        self._syncer = syncer
        self._jobs = jobs
        self._job_id = job_id
        self._served: Snapshot | None = None

    @classmethod
    def of(cls, lab: Lab, policy: Policy) -> Self:
        syncer = WeightSyncer(
            policy_client=policy.client,
            deploy_mgr=lab.deployments,
            deployment_id=lab.deployment_id,
            base_model=lab.base_model,
            first_checkpoint_type="base",
        )
        return cls(policy, syncer, lab.jobs, lab.job.job_id)

    def sync(self) -> Snapshot:
        """The policy as it is now, served by the deployment: a base first, deltas after, nothing when
        no step was made since. The server must have counted as many steps as we did."""
        if self._served is None or self._served.step != self._policy.num_steps:
            self._served = self._save_and_hotload(f"step_{self._policy.num_steps:05d}")
        return self._served

    def follow(self, client: FiretitanTrainingClient) -> None:
        """Goes on with a new client of the same trainer; the chain of deltas goes on, too."""
        self._syncer.policy_client = client

    def _save_and_hotload(self, name: str) -> Snapshot:
        identity = self._syncer.save_and_hotload(name)
        promise(identity is not None, f"{name} was saved and hot-loaded, but has no identity")
        snapshot = self._look_up(str(identity))
        promise(
            snapshot.step == self._policy.num_steps,
            f"snapshot {snapshot.identity} is of step {snapshot.step}, "
            f"but {self._policy.num_steps} optimizer steps were made",
        )
        return snapshot

    def _look_up(self, identity: str) -> Snapshot:
        rows = self._jobs.list_checkpoints(self._job_id)
        found = [row for row in rows if row["name"].rpartition("/")[2] == identity]
        promise(len(found) == 1, f"the job lists {len(found)} checkpoints named {identity}")
        return _snapshot(identity, found[0])


def _snapshot(identity: str, row: dict[str, Any]) -> Snapshot:
    return Snapshot(identity, row["kind"], row["step"], int(row["sizeBytes"]), row["digest"])
