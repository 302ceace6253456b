"""Rows as the resources that clients see. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from homefire.checkpoints.progress import Progress
from homefire.control.db.rows import (
    BaseModel,
    DeploymentRow,
    EvaluationRow,
    JobRow,
    ModelRow,
    OperationRow,
    ReplicaRow,
)
from homefire.control.rank_count import names_other_hardware
from homefire.control.shapes import accelerators_named
from homefire.foundation.clock import rfc3339
from homefire.wire.ids import checkpoint_name, deployment_name, job_name, model_name
from homefire.wire.internal import TrainerState, TrainerStatus
from homefire.wire.manifest import CheckpointKind, Manifest
from homefire.wire.records import Evaluation, EvaluationEntry
from homefire.wire.resources import (
    BaseModelDetails,
    CheckpointRow,
    CheckpointType,
    Deployment,
    DeploymentState,
    JobState,
    Model,
    ModelKind,
    ModelState,
    Operation,
    PeftDetails,
    Placement,
    ReplicaStats,
    Status,
    TrainerJob,
    TrainerJobRequest,
)
from homefire.wire.specs import TrainerMode

_CODES = {
    JobState.FAILED: "INTERNAL",
    JobState.CANCELLED: "CANCELLED",
}


_DOING = {
    TrainerState.STARTING: "its engine is loading the model",
    TrainerState.RECOVERING: "recovering",
    TrainerState.STOPPING: "writing a recovery point",
}


def job_resource(job: JobRow, trainer: TrainerStatus | None, *, store: str) -> TrainerJob:
    """`trainer`: what its process says, if it says something."""
    config, request = job.config, job.config.request
    return TrainerJob(
        name=job_name(job.account, job.id),
        display_name=request.display_name or "",
        create_time=rfc3339(job.created_at),
        update_time=rfc3339(job.updated_at),
        completed_time=None if job.completed_at is None else rfc3339(job.completed_at),
        state=job.state,
        status=Status(_CODES.get(job.state, "OK"), _job_message(job, trainer)),
        training_config=msgspec.structs.replace(
            request.training_config,
            base_model=config.base_model.name,
            lora_rank=config.lora_rank,
            max_context_length=config.max_context_length,
        ),
        training_shape=config.training_shape,
        trainer_mode=config.mode,
        engine_ranks=config.ranks,
        dataset=request.dataset or "",
        service_mode=request.service_mode is not False,
        keep_alive=bool(request.keep_alive),
        node_count=request.node_count or 1,
        forward_only=config.mode is TrainerMode.FORWARD_ONLY,
        hot_load_deployment_id=request.hot_load_deployment_id,
        hot_load_bucket_url=bucket_url(store, job.account, job.id),
        purpose=request.purpose,
        managed_by=request.managed_by,
        trainer_replica_count=request.trainer_replica_count,
        inactivity_timeout=request.inactivity_timeout,
        disable_inactivity_cleanup=request.disable_inactivity_cleanup,
        use_reservation=request.use_reservation,
        reservation_target=request.reservation_target,
        preemptible=request.preemptible,
        retention=None if config.retention.is_empty else config.retention,
    )


def bucket_url(store: str, account: str, job_id: str) -> str:
    root = store if "://" in store else f"file://{store}"
    return f"{root}/{account}/{job_id}/"


def doing(trainer: TrainerStatus | None) -> str:
    """What keeps a trainer from running operations, and how far that has come; nothing when it runs."""
    what = _DOING.get(trainer.state, "") if trainer else ""
    return f"{what}: {trainer.detail}" if trainer and what and trainer.detail else what


def _job_message(job: JobRow, trainer: TrainerStatus | None) -> str:
    """`Warning:` in front makes the clients print it: what was asked for and not always sent."""
    request = job.config.request
    decided = _named(
        learningRate=request.training_config.learning_rate,
        gradientAccumulationSteps=_above_one(request.training_config.gradient_accumulation_steps),
    )
    pointless = _pointless_here(request)
    notes = [
        f"{decided} recorded, not applied: optim_step decides" if decided else "",
        f"{pointless} recorded, not applied: this machine is your own" if pointless else "",
        _rank_note(job),
    ]
    text = "; ".join(filter(None, [job.message or doing(trainer), *notes]))
    is_surprising = pointless not in ("", "useReservation") and not job.message
    return f"Warning: {text}" if is_surprising else text


def _rank_note(job: JobRow) -> str:
    shape = job.config.training_shape
    named = accelerators_named(shape) if shape else None
    if named is None or named == job.config.ranks:
        return ""
    return (
        f"{shape} counts {named} accelerators of the hosted service: the engine has one rank here"
    )


def _pointless_here(request: TrainerJobRequest) -> str:
    asked = request.training_config
    is_elsewhere = names_other_hardware(request)
    return _named(
        acceleratorType=asked.accelerator_type if is_elsewhere else None,
        acceleratorCount=asked.accelerator_count if is_elsewhere else None,
        region=asked.region,
        customImageTag=asked.custom_image_tag,
        nodeCount=_above_one(request.node_count),
        trainerReplicaCount=_above_one(request.trainer_replica_count),
        inactivityTimeout=request.inactivity_timeout,
        disableInactivityCleanup=request.disable_inactivity_cleanup,
        useReservation=request.use_reservation,
        reservationTarget=request.reservation_target,
        preemptible=request.preemptible,
    )


def _above_one(count: int | None) -> bool:
    return (count or 1) > 1


def _named(**given: object) -> str:
    """The names of those that were given, as a sentence's subject."""
    *others, last = [name for name, value in given.items() if value] or [""]
    return f"{', '.join(others)} and {last}" if others else last


def deployment_resource(
    deployment: DeploymentRow, replicas: Sequence[ReplicaRow], *, num_ready: int, store: str
) -> Deployment:
    config = deployment.config
    trainer = config.hot_load_trainer_job
    return Deployment(
        name=deployment_name(deployment.account, deployment.id),
        display_name=config.display_name,
        description=config.description,
        create_time=rfc3339(deployment.created_at),
        update_time=rfc3339(deployment.updated_at),
        state=deployment.state,
        status=_deployment_status(deployment),
        base_model=config.base_model.name,
        min_replica_count=config.min_replica_count,
        max_replica_count=config.max_replica_count,
        replica_count=len(replicas),
        desired_replica_count=config.num_replicas,
        replica_stats=ReplicaStats(
            ready_replica_count=num_ready,
            initializing_replica_count=max(0, len(replicas) - num_ready),
        ),
        enable_hot_load=config.enable_hot_load,
        hot_load_bucket_type=config.hot_load_bucket_type,
        hot_load_bucket_url=_bucket_of(trainer, store) if trainer else None,
        hot_load_trainer_job=trainer,
        hot_load_transition_type=_transition_type(config.hot_load_transition_type),
        deployment_shape=config.deployment_shape,
        accelerator_type=config.accelerator_type,
        accelerator_count=config.accelerator_count,
        max_context_length=config.max_context_length,
        placement=Placement(config.region) if config.region else None,
        for_training=config.for_training,
        preemptible=config.preemptible,
        annotations=config.annotations,
    )


def _transition_type(configured: str | None) -> str:
    """`DRAIN` is a word of ours, and what no word means; clients stop at words that they do not know."""
    known = configured in ("SYNC", "ASYNC")
    return configured if configured and known else "HOT_LOAD_TRANSITION_TYPE_UNSPECIFIED"


def _deployment_status(deployment: DeploymentRow) -> Status:
    code = "INTERNAL" if deployment.state is DeploymentState.FAILED else "OK"
    config = deployment.config
    pointless = _named(
        acceleratorType=config.accelerator_type,
        acceleratorCount=config.accelerator_count,
        region=config.region,
        preemptible=config.preemptible,
    )
    note = f"{pointless} recorded, not applied: this machine is your own" if pointless else ""
    return Status(code, "; ".join(filter(None, [deployment.message, note])))


def _bucket_of(trainer_job: str, store: str) -> str:
    _, account, _, job_id = trainer_job.split("/")
    return bucket_url(store, account, job_id)


def checkpoint_row(manifest: Manifest) -> CheckpointRow:
    created = rfc3339(manifest.created_at)
    expires = manifest.expires_at
    return CheckpointRow(
        name=checkpoint_name(manifest.account, manifest.job, manifest.identity),
        create_time=created,
        update_time=created,
        checkpoint_type=checkpoint_type(manifest),
        promotable=manifest.kind is not CheckpointKind.STATE,
        step=manifest.step,
        size_bytes=manifest.size_bytes,
        digest=manifest.digest,
        parent=manifest.parent,
        kind=manifest.kind.value,
        expire_time=None if expires is None else rfc3339(expires),
        pinned=manifest.pinned,
    )


def checkpoint_type(manifest: Manifest) -> CheckpointType:
    if manifest.kind is CheckpointKind.STATE:
        is_lora = manifest.lora is not None
        return CheckpointType.TRAINING_LORA if is_lora else CheckpointType.TRAINING
    return {
        CheckpointKind.BASE: CheckpointType.INFERENCE_BASE,
        CheckpointKind.DELTA: CheckpointType.INFERENCE_ARC_V2,
        CheckpointKind.LORA: CheckpointType.INFERENCE_LORA,
    }[manifest.kind]


def model_resource(
    model: ModelRow, *, details: BaseModelDetails | None, peft: PeftDetails | None
) -> Model:
    return Model(
        name=model_name(model.account, model.id),
        display_name=model.id,
        create_time=rfc3339(model.created_at),
        state=model.state,
        kind=model.kind,
        source="promoted",
        base_model_details=details,
        peft_details=peft,
        trainer_job=job_name(model.account, model.source.job),
        checkpoint=model.source.checkpoint,
        digest=model.digest or None,
    )


def base_model_resource(
    model: BaseModel, source: str, details: BaseModelDetails, *, digest: str | None = None
) -> Model:
    """A model that was not promoted but found."""
    return Model(
        name=model.name,
        display_name=model.name.rpartition("/")[2],
        state=ModelState.READY,
        kind=ModelKind.HF_BASE_MODEL,
        source=source,
        base_model_details=details,
        digest=digest,
    )


def operation_resource(
    operation: OperationRow, model: Model | None, *, progress: Progress | None = None
) -> Operation:
    """`metadata.progress` is what the worker last said: stage, done, total."""
    metadata: dict[str, object] = {"model": model_name(operation.account, operation.model)}
    if progress is not None:
        metadata["progress"] = msgspec.to_builtins(progress)
    error = Status(operation.error_code, operation.error) if operation.error else None
    return Operation(
        name=operation.name,
        done=operation.done,
        metadata=metadata,
        error=error,
        response=model if operation.done and error is None else None,
    )


def evaluation_resource(row: EvaluationRow) -> Evaluation:
    entry = msgspec.convert(row.entry, EvaluationEntry)
    return Evaluation(id=row.id, at=row.at, **msgspec.structs.asdict(entry))
