"""What the control plane is asked for, and what it answers, as plain dataclasses."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Self

from homefire.sdk.connection import Json

DEFAULT_DELTA_COMPRESSION = "arc_v2"
"""Protocol name of the delta format. The name is kept; the bytes are homefire's own."""
DEFAULT_CHECKSUM_FORMAT = "alder32"
"""Protocol name (sic) of the delta checksum. homefire verifies SHA-256 digests instead."""


class GradAccNormalization(StrEnum):
    """What the accumulated gradient is divided by before clipping and the step."""

    NUM_LOSS_TOKENS = "num_loss_tokens"
    """The number of tokens with a non-zero gradient."""
    NUM_SEQUENCES = "num_sequences"
    """The number of sequences with a non-zero gradient."""
    NONE = "none"
    """Nothing: the gradient of the sum of the losses."""


@dataclass
class TrainerJobConfig:
    """A trainer job to create. `validate()` raises ValueError naming the field and the remedy.

    Example: TrainerJobConfig(base_model="accounts/fireworks/models/tiny",
    training_shape_ref=profile.training_shape_version, lora_rank=0).
    """

    base_model: str
    lora_rank: int = 0
    """0 trains all parameters; > 0 trains an adapter of that rank."""
    max_context_length: int | None = None
    """Tokens. A training shape decides it when one is given."""
    learning_rate: float = 1e-05
    """Recorded with the job; each `optim_step` brings its own."""
    gradient_accumulation_steps: int = 1
    """Recorded with the job; gradients accumulate over `forward_backward` calls."""
    node_count: int | None = None
    display_name: str | None = None
    hot_load_deployment_id: str | None = None
    region: str | None = None
    custom_image_tag: str | None = None
    extra_args: list[str] | None = None
    accelerator_type: str | None = None
    accelerator_count: int | None = None
    training_shape_ref: str | None = None
    """`accounts/<a>/trainingShapes/<s>[/versions/<v>]`."""
    forward_only: bool = False
    """A frozen reference model."""
    skip_validations: bool = False
    purpose: str | None = None
    managed_by: str | None = None

    def validate(self) -> None:
        """ValueError naming the first field that cannot be right, and the remedy."""
        if not self.base_model:
            raise ValueError("base_model is empty: name one, e.g. 'accounts/fireworks/models/tiny'")
        if self.lora_rank < 0:
            raise ValueError(
                f"lora_rank is {self.lora_rank}: use 0 (all parameters) or a positive rank"
            )
        _check_positive("gradient_accumulation_steps", self.gradient_accumulation_steps)
        for name in ("max_context_length", "node_count", "accelerator_count"):
            _check_positive(name, getattr(self, name))
        if not self.learning_rate >= 0:
            raise ValueError(f"learning_rate is {self.learning_rate}: use a number >= 0")
        self._check_shape_owns_hardware()

    def _check_shape_owns_hardware(self) -> None:
        if self.training_shape_ref is None:
            return
        for name in ("accelerator_type", "accelerator_count", "node_count", "custom_image_tag"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{name} conflicts with training_shape_ref: the shape owns the hardware; "
                    f"leave out {name}, or leave out the shape"
                )

    def request_params(self) -> dict[str, str]:
        """The query of the create call."""
        if self.training_shape_ref is None:
            return {"skipValidations": "true"}
        params = {"trainingShape": self.training_shape_ref}
        return {**params, "skipValidations": "true"} if self.skip_validations else params

    def request_body(self) -> Json:
        """The JSON of the create call."""
        manual = self.training_shape_ref is None
        training = {
            "baseModel": self.base_model,
            "loraRank": self.lora_rank,
            "learningRate": self.learning_rate,
            "gradientAccumulationSteps": self.gradient_accumulation_steps,
            "maxContextLength": self.max_context_length if manual else None,
            "customImageTag": self.custom_image_tag,
            "acceleratorType": self.accelerator_type,
            "acceleratorCount": self.accelerator_count,
            "region": self.region,
            "extraArgs": self.extra_args,
        }
        body = {
            "serviceMode": True,
            "keepAlive": False,
            "dataset": "",
            "trainingConfig": _without_none(training),
            "nodeCount": (self.node_count or 1) if manual else None,
            "displayName": self.display_name,
            "hotLoadDeploymentId": self.hot_load_deployment_id,
            "forwardOnly": True if self.forward_only else None,
            "purpose": self.purpose,
            "managedBy": self.managed_by,
        }
        return _without_none(body)


@dataclass
class CreatedTrainerJob:
    """A job that exists; it may still be starting."""

    job_name: str
    """`accounts/<account>/rlorTrainerJobs/<job_id>`."""
    job_id: str


@dataclass
class TrainerServiceEndpoint:
    """A trainer that answers. `base_url` is what `FiretitanServiceClient` connects to."""

    job_name: str
    job_id: str
    base_url: str
    max_context_length: int | None = None
    """Tokens, when the job says it."""


@dataclass
class TrainingShapeProfile:
    """One resolved version of a training shape: which hardware and limits a job gets."""

    training_shape_version: str
    """What `TrainerJobConfig.training_shape_ref` takes."""
    trainer_image_tag: str
    max_supported_context_length: int
    """Tokens."""
    node_count: int
    deployment_shape_version: str
    deployment_image_tag: str
    accelerator_type: str
    accelerator_count: int
    base_model_weight_precision: str
    pipeline_parallelism: int
    trainer_mode: str = ""
    """`POLICY_TRAINER` (all parameters), `LORA_TRAINER` or `FORWARD_ONLY`."""

    @property
    def training_shape(self) -> str:
        """The shape's name without its version."""
        return self.training_shape_version.partition("/versions/")[0]

    @property
    def deployment_shape(self) -> str | None:
        """What `DeploymentConfig.deployment_shape` takes; None when the shape has none."""
        return self.deployment_shape_version or None

    @property
    def supports_lora(self) -> bool:
        return self.trainer_mode == "LORA_TRAINER"

    @classmethod
    def from_version(cls, version: Json) -> Self:
        snapshot: Json = version.get("snapshot") or {}
        sharding: Json = snapshot.get("trainerShardingScheme") or {}
        return cls(
            training_shape_version=version.get("name", ""),
            trainer_image_tag=snapshot.get("trainerImageTag", ""),
            max_supported_context_length=int(snapshot.get("maxSupportedContextLength") or 0),
            node_count=int(snapshot.get("nodeCount") or 1),
            deployment_shape_version=snapshot.get("deploymentShapeVersion", ""),
            deployment_image_tag=snapshot.get("deploymentImageTag", ""),
            accelerator_type=snapshot.get("acceleratorType", ""),
            accelerator_count=int(snapshot.get("acceleratorCount") or 0),
            base_model_weight_precision=snapshot.get("baseModelWeightPrecision", ""),
            pipeline_parallelism=int(sharding.get("pipelineParallelism") or 1),
            trainer_mode=snapshot.get("trainerMode", ""),
        )


@dataclass
class DeploymentConfig:
    """An inference deployment to create, usually linked to a trainer's snapshots.

    Example: DeploymentConfig("research-serving", "accounts/fireworks/models/tiny",
    hot_load_trainer_job=created.job_name).
    """

    deployment_id: str
    base_model: str
    deployment_shape: str | None = None
    region: str | None = None
    min_replica_count: int = 0
    max_replica_count: int = 1
    """0 keeps the deployment stopped."""
    accelerator_type: str = "NVIDIA_H200_141GB"
    """Not sent when a deployment_shape is given; a local server serves on what it has."""
    hot_load_bucket_type: str | None = "FW_HOSTED"
    hot_load_trainer_job: str | None = None
    """`accounts/<a>/rlorTrainerJobs/<job>`: whose snapshots the deployment can load."""
    skip_shape_validation: bool = False
    disable_speculative_decoding: bool = False
    extra_args: list[str] | None = None
    extra_values: dict[str, str] | None = None

    def validate(self) -> None:
        """ValueError naming the first field that cannot be right, and the remedy."""
        if not self.deployment_id:
            raise ValueError("deployment_id is empty: choose a name, e.g. 'research-serving'")
        if not self.base_model:
            raise ValueError("base_model is empty: name one, e.g. 'accounts/fireworks/models/tiny'")
        if not 0 <= self.min_replica_count <= self.max_replica_count:
            raise ValueError(
                f"min_replica_count {self.min_replica_count} and max_replica_count "
                f"{self.max_replica_count} must satisfy 0 <= min <= max"
            )

    def request_params(self) -> dict[str, str]:
        """The query of the create call."""
        params = {"deploymentId": self.deployment_id}
        if self.skip_shape_validation:
            params["skipShapeValidation"] = "true"
        if self.disable_speculative_decoding:
            params["disableSpeculativeDecoding"] = "true"
        return params

    def request_body(self) -> Json:
        """The JSON of the create call."""
        shaped = self.deployment_shape is not None
        body = {
            "baseModel": self.base_model,
            "minReplicaCount": self.min_replica_count,
            "maxReplicaCount": self.max_replica_count,
            "enableHotLoad": True,
            "placement": {"region": self.region} if self.region else None,
            "hotLoadBucketType": self.hot_load_bucket_type,
            "hotLoadTrainerJob": self.hot_load_trainer_job,
            "deploymentShape": self.deployment_shape,
            "acceleratorType": None if shaped else self.accelerator_type,
            "extraArgs": self.extra_args,
            "extraValues": self.extra_values,
        }
        return _without_none(body)


@dataclass
class DeploymentInfo:
    """A deployment as the server sees it."""

    deployment_id: str
    name: str
    state: str
    """`CREATING`, `READY`, `UPDATING`, `FAILED`, `DELETING` or `DELETED`."""
    hot_load_bucket_url: str | None = None
    inference_model: str | None = None
    """What completions take as `model`."""

    @classmethod
    def from_resource(cls, resource: Json, *, account: str) -> Self:
        deployment_id = str(resource.get("name", "")).rpartition("/")[2]
        return cls(
            deployment_id=deployment_id,
            name=resource.get("name", ""),
            state=resource.get("state", "STATE_UNSPECIFIED"),
            hot_load_bucket_url=resource.get("hotLoadBucketUrl"),
            inference_model=f"accounts/{account}/deployments/{deployment_id}",
        )


def _check_positive(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise ValueError(f"{name} is {value}: use a whole number >= 1, or leave it out")


def _without_none(fields: dict[str, Any]) -> Json:
    return {name: value for name, value in fields.items() if value is not None}
