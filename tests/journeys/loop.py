"""A connected research loop against a running homefire: what the journeys drive."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tinker

from homefire.checkpoints import DirectoryStore
from homefire.foundation.events import read_events
from homefire.sdk import (
    CreatedTrainerJob,
    DeploymentConfig,
    DeploymentManager,
    DeploymentSampler,
    FiretitanServiceClient,
    FiretitanTrainingClient,
    TrainerJobConfig,
    TrainerJobManager,
    WeightSyncer,
)

ADAM = tinker.AdamParams(learning_rate=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01)


def row(text: bytes, weights: list[float] | None = None) -> tinker.Datum:
    """Next-byte prediction over `text`."""
    tokens = list(text)
    targets = tokens[1:]
    inputs = {
        "target_tokens": tinker.TensorData(data=targets, dtype="int64", shape=[len(targets)]),
        "weights": tinker.TensorData(
            data=weights or [1.0] * len(targets), dtype="float32", shape=[len(targets)]
        ),
    }
    return tinker.Datum(model_input=tinker.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)


BATCH = [
    row(b"homefire trains what you own"),
    row(b"sorted: 1257"),
    row(b"a longer row than these"),
]


@dataclass
class Loop:
    server: Any
    job: CreatedTrainerJob
    jobs: TrainerJobManager
    deployments: DeploymentManager
    deployment_id: str
    lora_rank: int = 0
    base_model: str = "tiny"
    client: FiretitanTrainingClient = field(init=False)
    syncer: WeightSyncer = field(init=False)

    def __post_init__(self) -> None:
        self.connect()
        self.syncer = self.new_syncer()

    def connect(self) -> FiretitanTrainingClient:
        """A new session on the job: what a script does after a crash."""
        endpoint = self.jobs.reconnect_and_wait(self.job.job_id, timeout_s=120)
        service = FiretitanServiceClient(base_url=endpoint.base_url, api_key=self.server.api_key)
        self.client = service.create_training_client(
            base_model=self.base_model, lora_rank=self.lora_rank
        )
        return self.client

    def follow(self, server: Any) -> None:
        """The same job and deployment behind a new `up`, which may listen elsewhere."""
        self.server = server
        self.jobs = TrainerJobManager(api_key=server.api_key, base_url=server.url)
        self.deployments = DeploymentManager(api_key=server.api_key, base_url=server.url)
        self.connect()
        self.syncer = self.new_syncer()

    def new_syncer(self) -> WeightSyncer:
        return WeightSyncer(
            policy_client=self.client,
            deploy_mgr=self.deployments,
            deployment_id=self.deployment_id,
            base_model=self.base_model,
            lora_rank=self.lora_rank,
        )

    def train(self, steps: int = 1, data: list[tinker.Datum] = BATCH) -> None:
        for _ in range(steps):
            self.client.forward_backward(data, "cross_entropy").result()
            self.client.optim_step(ADAM).result()

    def logprobs(self, data: list[tinker.Datum] = BATCH) -> list[list[float]]:
        result = self.client.forward(data, "cross_entropy").result()
        return [list(out["logprobs"].data) for out in result.loss_fn_outputs]

    def sampler(self, tokenizer: Any = None, **options: Any) -> DeploymentSampler:
        return DeploymentSampler(
            inference_url=self.deployments.inference_url,
            model=f"accounts/local/deployments/{self.deployment_id}",
            api_key=self.server.api_key,
            tokenizer=tokenizer,
            **options,
        )

    @property
    def store(self) -> DirectoryStore:
        return DirectoryStore(Path(self.server.home) / "store")

    def events(self, name: str) -> list[dict[str, Any]]:
        path = Path(self.server.home) / "jobs" / self.job.job_id / "events.jsonl"
        return [event for _, event in read_events(path) if event["event"] == name]


def start_loop(
    server: Any,
    *,
    deployment_id: str = "serving",
    lora_rank: int = 0,
    base_model: str = "tiny",
    ranks: int | None = None,
    min_replicas: int = 0,
    max_replicas: int = 1,
) -> Loop:
    """Requests a trainer and a deployment linked to it, waits for both and connects."""
    jobs = TrainerJobManager(api_key=server.api_key, base_url=server.url)
    deployments = DeploymentManager(api_key=server.api_key, base_url=server.url)
    job = jobs.create(
        TrainerJobConfig(base_model=base_model, lora_rank=lora_rank, accelerator_count=ranks)
    )
    deployments.create_or_get(
        DeploymentConfig(
            deployment_id=deployment_id,
            base_model=base_model,
            hot_load_trainer_job=job.job_name,
            min_replica_count=min_replicas,
            max_replica_count=max_replicas,
        )
    )
    jobs.wait_for_ready(job.job_id)
    deployments.wait_for_ready(deployment_id)
    return Loop(server, job, jobs, deployments, deployment_id, lora_rank, base_model)
