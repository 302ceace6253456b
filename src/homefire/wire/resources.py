"""Resources of the control plane, as the Fireworks protocol writes them in JSON.

Bodies are camelCase, times RFC3339, states their full names. Unknown fields are ignored, so that
clients of every version are understood; what a hosted field means nothing here is kept and given
back (see docs/api.md).
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import msgspec

from homefire.wire.internal import CanaryVerdict, Drain
from homefire.wire.retention import RetentionPolicy
from homefire.wire.specs import TrainerMode


class JobState(StrEnum):
    """State of a trainer job."""

    UNSPECIFIED = "JOB_STATE_UNSPECIFIED"
    """Never stored: the protocol's zero value."""
    CREATING = "JOB_STATE_CREATING"
    """Capacity is reserved and the trainer starts or loads its model."""
    RUNNING = "JOB_STATE_RUNNING"
    """The trainer takes operations; a restart of a dead trainer does not leave this state."""
    COMPLETED = "JOB_STATE_COMPLETED"
    """Ended on purpose with its work done; can be resumed."""
    FAILED = "JOB_STATE_FAILED"
    """The trainer cannot run; the status message says why. Can be resumed."""
    CANCELLED = "JOB_STATE_CANCELLED"
    """Stopped by the user behind a recovery point; can be resumed."""
    DELETING = "JOB_STATE_DELETING"
    """The trainer is being stopped before the job becomes a tombstone."""
    WRITING_RESULTS = "JOB_STATE_WRITING_RESULTS"
    """Of the hosted protocol; never entered here."""
    VALIDATING = "JOB_STATE_VALIDATING"
    """Of the hosted protocol; never entered here."""
    DELETING_CLEANING_UP = "JOB_STATE_DELETING_CLEANING_UP"
    """Of the hosted protocol; never entered here."""
    PENDING = "JOB_STATE_PENDING"
    """Waits for capacity; the status message says for what."""
    EXPIRED = "JOB_STATE_EXPIRED"
    """Of the hosted protocol; never entered here."""
    RE_QUEUEING = "JOB_STATE_RE_QUEUEING"
    """Of the hosted protocol; never entered here."""
    CREATING_INPUT_DATASET = "JOB_STATE_CREATING_INPUT_DATASET"
    """Of the hosted protocol; never entered here."""
    IDLE = "JOB_STATE_IDLE"
    """Of the hosted protocol; never entered here."""
    CANCELLING = "JOB_STATE_CANCELLING"
    """The trainer finishes its operation and writes a recovery point."""
    EARLY_STOPPED = "JOB_STATE_EARLY_STOPPED"
    """Of the hosted protocol; never entered here, but could be resumed."""
    PAUSED = "JOB_STATE_PAUSED"
    """Stopped behind a recovery point and meant to go on; can be resumed."""
    DELETED = "JOB_STATE_DELETED"
    """A tombstone: nothing runs, its checkpoints can still be listed and promoted."""
    ARCHIVED = "JOB_STATE_ARCHIVED"
    """Of the hosted protocol; never entered here."""


class DeploymentState(StrEnum):
    """State of a deployment."""

    UNSPECIFIED = "STATE_UNSPECIFIED"
    """Never stored: the protocol's zero value."""
    CREATING = "CREATING"
    """No replica has been ready yet."""
    READY = "READY"
    """As many replicas as asked answer completions; none when scaled to zero."""
    DELETING = "DELETING"
    """Replicas are being stopped before the deployment goes."""
    FAILED = "FAILED"
    """Its replicas cannot run; the status message says why."""
    UPDATING = "UPDATING"
    """The number of replicas is changing."""
    DELETED = "DELETED"
    """A tombstone; a new deployment may take its id."""


class CheckpointType(StrEnum):
    """What a row of a job's checkpoint list is."""

    TRAINING = "CHECKPOINT_TYPE_TRAINING"
    """Train state of all parameters: weights and optimizer. Not promotable."""
    TRAINING_LORA = "CHECKPOINT_TYPE_TRAINING_LORA"
    """Train state of an adapter. Not promotable."""
    INFERENCE_BASE = "CHECKPOINT_TYPE_INFERENCE_BASE"
    """A full sampler snapshot."""
    INFERENCE_LORA = "CHECKPOINT_TYPE_INFERENCE_LORA"
    """A sampler snapshot that is an adapter."""
    INFERENCE_ARC_V2 = "CHECKPOINT_TYPE_INFERENCE_ARC_V2"
    """A sampler snapshot stored as a delta. Here it is promotable too: its chain is applied."""


class ModelState(StrEnum):
    """State of a model resource."""

    UPLOADING = "UPLOADING"
    """A promotion is writing its files."""
    READY = "READY"
    """Its files are complete and verified."""


class ModelKind(StrEnum):
    """What a model's directory holds."""

    HF_BASE_MODEL = "HF_BASE_MODEL"
    """An ordinary Hugging Face directory."""
    HF_PEFT_ADDON = "HF_PEFT_ADDON"
    """An ordinary PEFT adapter directory."""


class Status(msgspec.Struct, frozen=True):
    """Why a resource is in its state. `code` is a gRPC code's name."""

    code: str = "OK"
    message: str = ""
    details: list[Any] = []


class Account(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    name: str
    display_name: str = ""
    state: str = "READY"


class TrainingConfig(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """What a trainer job trains. `null` and absent mean the same."""

    base_model: str | None = None
    lora_rank: int | None = None
    learning_rate: float | None = None
    """Recorded, not applied: `optim_step` carries the learning rate."""
    gradient_accumulation_steps: int | None = None
    """Recorded, not applied: gradients add up until `optim_step`."""
    max_context_length: int | None = None
    """Tokens of the longest row; the model's own limit when absent."""
    projection_head_dim: int | None = None
    custom_image_tag: str | None = None
    accelerator_type: str | None = None
    accelerator_count: int | None = None
    region: str | None = None
    extra_args: list[str] | None = None
    """Arguments of the hosted trainer: refused unless empty."""


class TrainerJobRequest(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """Body of `POST /v1/accounts/{a}/rlorTrainerJobs`."""

    training_config: TrainingConfig = TrainingConfig()
    display_name: str | None = None
    service_mode: bool | None = None
    keep_alive: bool | None = None
    dataset: str | None = None
    node_count: int | None = None
    trainer_replica_count: int | None = None
    hot_load_deployment_id: str | None = None
    forward_only: bool | None = None
    purpose: str | None = None
    managed_by: str | None = None
    extra_values: dict[str, str] | None = None
    """Overrides of the hosted trainer: refused unless empty."""
    inactivity_timeout: str | None = None
    """E.g. `1800s`. Recorded, not applied: on your own machine nothing stops a quiet trainer."""
    disable_inactivity_cleanup: bool | None = None
    use_reservation: bool | None = None
    reservation_target: str | None = None
    preemptible: bool | None = None
    retention: RetentionPolicy | None = None
    """Which checkpoints stay. Ours."""


class TrainerJob(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    name: str
    display_name: str = ""
    create_time: str
    update_time: str
    completed_time: str | None = None
    state: JobState
    status: Status
    training_config: TrainingConfig
    training_shape: str | None = None
    trainer_mode: TrainerMode
    engine_ranks: int = 1
    """Ours: processes that the job's parameters and rows are divided among."""
    dataset: str = ""
    service_mode: bool = True
    keep_alive: bool = False
    node_count: int = 1
    forward_only: bool = False
    hot_load_deployment_id: str | None = None
    hot_load_bucket_url: str
    purpose: str | None = None
    managed_by: str | None = None
    trainer_replica_count: int | None = None
    inactivity_timeout: str | None = None
    disable_inactivity_cleanup: bool | None = None
    use_reservation: bool | None = None
    reservation_target: str | None = None
    preemptible: bool | None = None
    retention: RetentionPolicy | None = None
    """Ours: absent where everything stays."""


class TrainerJobList(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    rlor_trainer_jobs: list[TrainerJob]
    next_page_token: str = ""
    total_size: int = 0


class Placement(msgspec.Struct, frozen=True, rename="camel"):
    region: str | None = None


class DeploymentRequest(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """Body of a deployment's create and patch; which fields were given is read from the JSON."""

    base_model: str | None = None
    display_name: str | None = None
    description: str | None = None
    min_replica_count: int | None = None
    max_replica_count: int | None = None
    enable_hot_load: bool | None = None
    hot_load_bucket_type: str | None = None
    hot_load_bucket_url: str | None = None
    hot_load_trainer_job: str | None = None
    hot_load_transition_type: str | None = None
    deployment_shape: str | None = None
    accelerator_type: str | None = None
    accelerator_count: int | None = None
    placement: Placement | None = None
    precision: str | None = None
    """Refused unless it is what the weights have: `BF16`."""
    for_training: bool | None = None
    preemptible: bool | None = None
    annotations: dict[str, str] | None = None
    extra_args: list[str] | None = None
    """Arguments of the hosted engine: refused unless empty."""
    extra_values: dict[str, str] | None = None
    max_context_length: int | None = None
    """Tokens of prompt and completion together; the model's own limit when absent."""


class ScaleRequest(msgspec.Struct, frozen=True, rename="camel"):
    replica_count: int


class ReplicaStats(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    ready_replica_count: int = 0
    initializing_replica_count: int = 0


class Deployment(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    name: str
    display_name: str = ""
    description: str = ""
    create_time: str
    update_time: str
    state: DeploymentState
    status: Status
    base_model: str
    min_replica_count: int
    max_replica_count: int
    replica_count: int
    desired_replica_count: int
    replica_stats: ReplicaStats
    enable_hot_load: bool = True
    hot_load_bucket_type: str = "FW_HOSTED"
    hot_load_bucket_url: str | None = None
    hot_load_trainer_job: str | None = None
    hot_load_transition_type: str = "HOT_LOAD_TRANSITION_TYPE_UNSPECIFIED"
    deployment_shape: str | None = None
    accelerator_type: str | None = None
    accelerator_count: int | None = None
    max_context_length: int
    precision: str = "BF16"
    placement: Placement | None = None
    for_training: bool = False
    preemptible: bool = False
    annotations: dict[str, str] = {}


class DeploymentList(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    deployments: list[Deployment]
    next_page_token: str = ""
    total_size: int = 0


class ShardingScheme(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    pipeline_parallelism: int = 1
    tensor_parallelism: int = 1


class ShapeSnapshot(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """What a training shape fixes. Every field that the SDK's profile reads is always there."""

    base_model: str
    trainer_mode: TrainerMode
    trainer_image_tag: str
    max_supported_context_length: int
    """Tokens."""
    node_count: int = 1
    deployment_shape_version: str
    deployment_image_tag: str
    accelerator_type: str
    accelerator_count: int
    min_total_accelerator_count: int
    base_model_weight_precision: str = "WEIGHT_PRECISION_BFLOAT16"
    trainer_sharding_scheme: ShardingScheme = ShardingScheme()
    model_type: str = ""


class TrainingShapeVersion(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """Example: accounts/local/trainingShapes/tiny-full/versions/v1."""

    name: str
    display_name: str = ""
    description: str = ""
    create_time: str
    update_time: str
    latest_validated: bool = True
    snapshot: ShapeSnapshot


class TrainingShapeVersionList(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    training_shape_versions: list[TrainingShapeVersion]
    next_page_token: str = ""


class TrainingShapeList(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    training_shapes: list[TrainingShapeVersion]
    """Each shape as its latest version, named without `/versions/…`."""
    next_page_token: str = ""


class BaseModelDetails(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    moe: bool
    """Whether the model routes tokens to experts."""
    parameter_count: int = 0
    model_type: str = ""
    max_context_length: int = 0


class PeftDetails(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    base_model: str
    r: int
    target_modules: list[str] = []


class Model(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    name: str
    display_name: str = ""
    create_time: str = ""
    state: ModelState
    kind: ModelKind
    source: str
    """Where its files come from: `built-in`, `directory`, `huggingface`, `imported` or `promoted`."""
    base_model_details: BaseModelDetails | None = None
    peft_details: PeftDetails | None = None
    trainer_job: str | None = None
    """Of a promoted model: the job."""
    checkpoint: str | None = None
    """Of a promoted model: the snapshot's identity."""
    digest: str | None = None


class ModelList(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    models: list[Model]
    next_page_token: str = ""
    total_size: int = 0


class CheckpointRow(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """A checkpoint of a job. `name` ends with the identity or the state's name."""

    name: str
    create_time: str
    update_time: str
    checkpoint_type: CheckpointType
    promotable: bool
    step: int
    size_bytes: int
    digest: str
    parent: str | None = None
    """Of a delta: the snapshot it applies to."""
    kind: str
    """`base`, `delta`, `lora` or `state`."""
    expire_time: str | None = None
    pinned: bool = False


class CheckpointList(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    checkpoints: list[CheckpointRow]
    next_page_token: str = ""


class PromoteRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Body of `POST /v1/accounts/{a}/checkpoints/{id}:promote`, in snake_case on the wire."""

    output_model: str
    trainer_job_id: str
    base_model: str | None = None
    hot_load_deployment_id: str | None = None
    async_promotion: bool = False


class Operation(msgspec.Struct, frozen=True, rename="camel", kw_only=True, omit_defaults=True):
    """Long work. When `done`, exactly one of `error` and `response` is there."""

    name: str
    done: bool
    metadata: dict[str, Any] = {}
    error: Status | None = None
    response: Model | None = None


class PromoteAnswer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`model` when the promotion was waited for, `operation` when it was asked to be asynchronous."""

    model: Model | None = None
    operation: Operation | None = None


class HotLoadSignal(msgspec.Struct, frozen=True, kw_only=True):
    """Body of `POST /hot_load/v1/models/hot_load`; fields that are only hints are not read."""

    identity: str | None = None
    """A sampler snapshot; null goes back to the base model."""
    reset_prompt_cache: bool | str = True
    """True and `all` free what is cached of prompts; false, `new_session` and `none` keep it for the weights
    that computed it, should they serve again. No prompt is ever continued under other weights."""
    drain: Drain = Drain.BOUNDED
    drain_timeout_s: float | None = None
    """Null: the replica's own, 90 s. The hosted header `x-fireworks-hot-load-drain-timeout` means the same."""


class LoadingState(msgspec.Struct, frozen=True, omit_defaults=True):
    stage: str
    """`idle`, `pending`, `loading`, `draining` or `error`."""
    target_snapshot_identity: str | None = None
    error: str = ""
    """Why the target could not be loaded. Ours: the hosted protocol gives no reason."""
    error_code: str = ""
    """Its name, e.g. `canary_mismatch`."""


class ServedState(msgspec.Struct, frozen=True):
    """Ours: how far what a replica serves is proven."""

    digest: str
    canary: CanaryVerdict
    attested_by: str
    """What the digest was taken of: `memory`."""


class LoadedReplica(msgspec.Struct, frozen=True):
    current_snapshot_identity: str | None
    readiness: bool
    loading_state: LoadingState
    homefire: ServedState


class HotLoadStatus(msgspec.Struct, frozen=True):
    replicas: list[LoadedReplica]
