"""The resources of a run on the server: a trainer job and the deployment that serves its snapshots."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from homefire.quickstart.server import Address
from homefire.sdk import (
    CreatedTrainerJob,
    DeploymentConfig,
    DeploymentManager,
    FiretitanServiceClient,
    FiretitanTrainingClient,
    TrainerJobConfig,
    TrainerJobManager,
    TrainerServiceEndpoint,
)


@dataclass
class Lab:
    address: Address
    jobs: TrainerJobManager
    deployments: DeploymentManager
    base_model: str
    """Resource name, e.g. `accounts/local/models/tiny`."""
    job: CreatedTrainerJob
    deployment_id: str
    endpoint: TrainerServiceEndpoint

    @property
    def deployment_model(self) -> str:
        """What completions name as their model."""
        return f"accounts/{self.deployments.account_id}/deployments/{self.deployment_id}"

    def connect(self) -> FiretitanTrainingClient:
        """A training client on the job's live weights; an earlier one is superseded."""
        return connect(self.endpoint, self.address, self.base_model)

    def reconnect(self) -> FiretitanTrainingClient:
        """As after a crash of this script: all that is known is the job's id."""
        self.endpoint = self.jobs.reconnect_and_wait(self.job.job_id, timeout_s=300)
        return self.connect()


@contextmanager
def open_lab(address: Address, base_model: str) -> Iterator[Lab]:
    """Requests trainer and deployment, waits for both in parallel, and deletes them in the end."""
    jobs = TrainerJobManager(api_key=address.api_key, base_url=address.base_url)
    deployments = DeploymentManager(api_key=address.api_key, base_url=address.base_url)
    with jobs, deployments:
        model = resource_name(jobs, base_model)
        with requested_job(jobs, model, "quickstart") as job:
            deployment_id = f"quickstart-{secrets.token_hex(3)}"
            config = DeploymentConfig(
                deployment_id, base_model=model, hot_load_trainer_job=job.job_name
            )
            deployments.create_or_get(config)
            try:
                endpoint = _wait_for_both(jobs, job, deployments, deployment_id)
                yield Lab(address, jobs, deployments, model, job, deployment_id, endpoint)
            finally:
                deployments.delete(deployment_id)


@contextmanager
def requested_job(
    jobs: TrainerJobManager, base_model: str, display_name: str
) -> Iterator[CreatedTrainerJob]:
    """A trainer job that exists as long as the block; waiting for it is another matter."""
    job = jobs.create(TrainerJobConfig(base_model=base_model, display_name=display_name))
    try:
        yield job
    finally:
        jobs.delete(job.job_id)


def connect(
    endpoint: TrainerServiceEndpoint, address: Address, base_model: str
) -> FiretitanTrainingClient:
    service = FiretitanServiceClient(base_url=endpoint.base_url, api_key=address.api_key)
    return service.create_training_client(base_model=base_model, lora_rank=0)


def resource_name(jobs: TrainerJobManager, base_model: str) -> str:
    """A catalog name such as `tiny` as a resource; repositories and directories stay as they are."""
    return base_model if "/" in base_model else f"accounts/{jobs.account_id}/models/{base_model}"


def _wait_for_both(
    jobs: TrainerJobManager,
    job: CreatedTrainerJob,
    deployments: DeploymentManager,
    deployment_id: str,
) -> TrainerServiceEndpoint:
    with ThreadPoolExecutor(max_workers=2) as pool:
        trainer = pool.submit(jobs.wait_for_ready, job.job_id)
        deployment = pool.submit(deployments.wait_for_ready, deployment_id)
        deployment.result()
        return trainer.result()
