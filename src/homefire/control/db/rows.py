"""Rows as the rest of control sees them: frozen, typed, decoded."""

from __future__ import annotations

from typing import Any

import msgspec

from homefire.launch import ProcessRecord
from homefire.wire.internal import Drain, SnapshotLocation, Transition
from homefire.wire.resources import (
    DeploymentState,
    JobState,
    ModelKind,
    ModelState,
    TrainerJobRequest,
)
from homefire.wire.retention import RetentionPolicy
from homefire.wire.specs import ActivationBudget, TrainerMode


class Need(msgspec.Struct, frozen=True):
    """What a process takes from the machine while it is admitted."""

    threads: int
    memory_bytes: int


class BaseModel(msgspec.Struct, frozen=True, kw_only=True):
    """A base model as it resolved when the resource was created; it does not change afterwards."""

    name: str
    """As the client named it."""
    directory: str
    tokenizer_id: str
    max_context_length: int
    context_limit_reason: str = ""
    """Why that is fewer tokens than the model has positions; empty where it is not."""

    @property
    def context_limit(self) -> str:
        """For a message: who sets the limit, and why."""
        return f"the limit of {self.name}" + (
            f": {self.context_limit_reason}" if self.context_limit_reason else ""
        )


class Supervision(msgspec.Struct, frozen=True, kw_only=True):
    """What control knows about the process that it keeps alive for a resource."""

    process: ProcessRecord | None = None
    restarts: int = 0
    """Deaths in a row without a healthy stretch between them."""
    not_before: float = 0.0
    """Unix time before which it is not started again."""
    ready_at: float | None = None
    """When this process was first seen ready."""
    caught_up: bool = False
    """A replica of this process has served the desired weights, so it may be routed to."""
    failure: str = ""
    """How the last process ended."""


class JobConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked for, and what it resolved to."""

    request: TrainerJobRequest
    training_shape: str | None
    base_model: BaseModel
    mode: TrainerMode
    lora_rank: int
    max_context_length: int
    need: Need
    micro_batch_tokens: int = 8192
    """Token budget of one micro-batch. The default is that of jobs made before it was recorded."""
    ranks: int = 1
    """Processes of its engine. The default is that of jobs made before shapes could ask for more."""
    activations: ActivationBudget | None = None
    """What a micro-batch may keep; None for jobs made before it was recorded, which keep all."""
    pooled: bool = False
    """A trainer of the root Tinker plane: its models have slots of their own."""
    retention: RetentionPolicy = RetentionPolicy()
    """Which checkpoints stay; may change at any time."""


class JobRow(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    account: str
    state: JobState
    message: str
    config: JobConfig
    supervision: Supervision
    created_at: float
    updated_at: float
    completed_at: float | None = None


class DeploymentConfig(msgspec.Struct, frozen=True, kw_only=True):
    base_model: BaseModel
    need: Need
    """Of one replica."""
    num_replicas: int
    """Wanted now, between `min_replica_count` and `max_replica_count`."""
    min_replica_count: int
    max_replica_count: int
    max_context_length: int
    display_name: str = ""
    description: str = ""
    enable_hot_load: bool = True
    hot_load_bucket_type: str = "FW_HOSTED"
    hot_load_trainer_job: str | None = None
    """Resource name of the job whose snapshots it loads."""
    hot_load_transition_type: str | None = None
    deployment_shape: str | None = None
    accelerator_type: str | None = None
    accelerator_count: int | None = None
    region: str | None = None
    for_training: bool = False
    preemptible: bool = False
    annotations: dict[str, str] = {}
    samples_job: str = ""
    """A sampler of the root Tinker plane: the job whose snapshots its sampling sessions name."""


class DesiredWeights(msgspec.Struct, frozen=True, kw_only=True):
    """What every replica of a deployment has to serve."""

    identity: str | None = None
    """None: the base model."""
    location: SnapshotLocation | None = None
    digest: str = ""
    """Of the snapshot's weights by its manifest: two jobs may use one identity. Empty for the base."""
    reset_prompt_cache: bool = True
    transition: Transition = Transition.DRAIN
    drain: Drain = Drain.BOUNDED
    drain_timeout_s: float | None = None
    generation: int = 0
    """Counts hot-load signals, so that asking again for a failed snapshot tries again."""


class DeploymentRow(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    account: str
    state: DeploymentState
    message: str
    config: DeploymentConfig
    desired: DesiredWeights
    purge: bool
    """Remove the row itself once the replicas have gone."""
    ledger_since: float
    """Ledger entries before this Unix time were cleared by the user."""
    created_at: float
    updated_at: float


class ReplicaRow(msgspec.Struct, frozen=True, kw_only=True):
    """An admitted replica; it holds its part of the capacity while the row exists."""

    deployment: str
    number: int
    supervision: Supervision
    leaving: bool = False
    """It is being stopped and its row goes with it."""


class PromotionSource(msgspec.Struct, frozen=True, kw_only=True):
    job: str
    checkpoint: str
    base_model: BaseModel


class ModelRow(msgspec.Struct, frozen=True, kw_only=True):
    """A promoted model."""

    account: str
    id: str
    state: ModelState
    kind: ModelKind
    source: PromotionSource
    operation: str
    worker: ProcessRecord | None
    digest: str
    created_at: float


class OperationRow(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    account: str
    done: bool
    error_code: str
    error: str
    model: str
    """Id of the model that it makes."""
    created_at: float


class EvaluationRow(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    account: str
    job: str
    at: float
    entry: dict[str, Any]
    """An EvaluationEntry as JSON."""


class ClientMetricsRow(msgspec.Struct, frozen=True, kw_only=True):
    job: str
    at: float
    step: int
    metrics: dict[str, float]


class TinkerSessionRow(msgspec.Struct, frozen=True, kw_only=True):
    """A session of the root Tinker plane. Example id: `ts-3f9a1c2e4b50536f`."""

    id: str
    account: str
    tags: list[str] = []
    user_metadata: dict[str, Any] = {}
    display_name: str | None = None
    project_id: str | None = None
    sdk_version: str | None = None
    created_at: float
    heartbeat_at: float
    """Written at most once a minute; the live value is in memory."""
    finished_at: float | None = None
    finish_reason: str | None = None
    """`success`, `errored` or `interrupted`; the first one given."""
    finish_detail: str | None = None


class TinkerRunRow(msgspec.Struct, frozen=True, kw_only=True):
    """A training run of the root plane: a model of a session, and a slot of its job's store."""

    id: str
    """The model id that clients derive, `ts-…:train:0`."""
    account: str
    session: str
    model_seq_id: int
    job: str
    base_model: str
    """As the client named it, or as its checkpoint does."""
    lora_rank: int
    """0: all parameters train."""
    user_metadata: dict[str, str] = {}
    source_path: str | None = None
    """The checkpoint it was created from."""
    created_at: float
    last_request_at: float
    """Of a request that control saw: creation, and routing after a restart of the gateway."""
    closed_at: float | None = None
    """When its trainer was told that the session is over and let go of its weights."""


class SamplingSessionRow(msgspec.Struct, frozen=True, kw_only=True):
    """A sampling session that control created; those of ephemeral saves have no row."""

    id: str
    account: str
    session: str
    seq_id: int
    sampler: str
    """The deployment."""
    base_model: str
    model_path: str | None = None
    """None: the base model is sampled."""
    created_at: float
