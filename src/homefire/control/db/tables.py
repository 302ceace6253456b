"""The statements as functions of a connection, with rows in and out. No decisions are taken here."""

from __future__ import annotations

import sqlite3

from homefire.control.db import statements as sql
from homefire.control.db.columns import as_json, changed, columns, every, insert, one
from homefire.control.db.rows import (
    ClientMetricsRow,
    DeploymentConfig,
    DeploymentRow,
    DesiredWeights,
    EvaluationRow,
    JobConfig,
    JobRow,
    ModelRow,
    OperationRow,
    ReplicaRow,
    Supervision,
)
from homefire.launch import ProcessRecord
from homefire.wire.internal import KeyRoute
from homefire.wire.resources import DeploymentState, JobState, ModelKind

Connection = sqlite3.Connection


def register_key(connection: Connection, sha256: str, account: str, now: float) -> None:
    connection.execute(sql.REVOKE_OTHER_KEYS, (account, sha256))
    connection.execute(sql.REGISTER_KEY, (sha256, account, now))


def keys(connection: Connection) -> list[KeyRoute]:
    return [KeyRoute(row["sha256"], row["account"]) for row in connection.execute(sql.KEYS)]


def key_number(connection: Connection, account: str) -> int | None:
    row = connection.execute(sql.KEY_OF_ACCOUNT, (account,)).fetchone()
    return None if row is None else row["number"]


def insert_job(connection: Connection, job: JobRow) -> None:
    insert(connection, sql.INSERT_JOB, job, what=f"trainer job {job.id!r}")


def job(connection: Connection, job_id: str) -> JobRow | None:
    return one(connection, sql.JOB, (job_id,), JobRow)


def jobs(connection: Connection) -> list[JobRow]:
    return every(connection, sql.JOBS, (), JobRow)


def advance_job(
    connection: Connection,
    job: JobRow,
    to: JobState,
    *,
    message: str,
    now: float,
    completed_at: float | None,
) -> bool:
    """False when the job is not in the state of `job` any more."""
    values = {"to": to, "message": message, "now": now, "completed_at": completed_at}
    return changed(connection, sql.ADVANCE_JOB, {**values, "id": job.id, "state": job.state})


def note_job(connection: Connection, job: JobRow, message: str, *, now: float) -> bool:
    values = {"message": message, "now": now, "id": job.id, "state": job.state}
    return changed(connection, sql.NOTE_JOB, values)


def supervise_job(connection: Connection, job_id: str, supervision: Supervision) -> None:
    connection.execute(sql.SUPERVISE_JOB, {"supervision": as_json(supervision), "id": job_id})


def configure_job(connection: Connection, job_id: str, config: JobConfig) -> None:
    connection.execute(sql.CONFIGURE_JOB, {"config": as_json(config), "id": job_id})


def insert_deployment(connection: Connection, deployment: DeploymentRow) -> None:
    connection.execute(sql.REMOVE_DEPLOYMENT, (deployment.id,))
    what = f"deployment {deployment.id!r}"
    insert(connection, sql.INSERT_DEPLOYMENT, deployment, what=what)


def deployment(connection: Connection, deployment_id: str) -> DeploymentRow | None:
    return one(connection, sql.DEPLOYMENT, (deployment_id,), DeploymentRow)


def deployments(connection: Connection) -> list[DeploymentRow]:
    return every(connection, sql.DEPLOYMENTS, (), DeploymentRow)


def advance_deployment(
    connection: Connection,
    deployment: DeploymentRow,
    to: DeploymentState,
    *,
    message: str,
    now: float,
) -> bool:
    values = {"to": to, "message": message, "now": now}
    guard = {"id": deployment.id, "state": deployment.state}
    return changed(connection, sql.ADVANCE_DEPLOYMENT, {**values, **guard})


def note_deployment(
    connection: Connection, deployment: DeploymentRow, message: str, *, now: float
) -> bool:
    values = {"message": message, "now": now, "id": deployment.id, "state": deployment.state}
    return changed(connection, sql.NOTE_DEPLOYMENT, values)


def configure_deployment(
    connection: Connection, deployment: DeploymentRow, config: DeploymentConfig, *, now: float
) -> bool:
    guard = {"id": deployment.id, "state": deployment.state}
    values = {"config": as_json(config), "now": now, **guard}
    return changed(connection, sql.CONFIGURE_DEPLOYMENT, values)


def desire_weights(
    connection: Connection, deployment: DeploymentRow, desired: DesiredWeights, *, now: float
) -> bool:
    guard = {"id": deployment.id, "state": deployment.state}
    values = {"desired": as_json(desired), "now": now, **guard}
    return changed(connection, sql.DESIRE_WEIGHTS, values)


def mark_purge(connection: Connection, deployment_id: str) -> None:
    connection.execute(sql.MARK_PURGE, (deployment_id,))


def clear_ledger(connection: Connection, deployment_id: str, *, now: float) -> None:
    connection.execute(sql.CLEAR_LEDGER, {"id": deployment_id, "now": now})


def remove_deployment(connection: Connection, deployment_id: str) -> None:
    connection.execute(sql.REMOVE_DEPLOYMENT, (deployment_id,))


def insert_replica(connection: Connection, replica: ReplicaRow) -> None:
    connection.execute(sql.INSERT_REPLICA, columns(replica))


def replicas(connection: Connection) -> list[ReplicaRow]:
    return every(connection, sql.REPLICAS, (), ReplicaRow)


def replica(connection: Connection, deployment_id: str, number: int) -> ReplicaRow | None:
    return one(connection, sql.REPLICA, (deployment_id, number), ReplicaRow)


def supervise_replica(
    connection: Connection, deployment_id: str, number: int, supervision: Supervision
) -> None:
    values = {"deployment": deployment_id, "number": number}
    connection.execute(sql.SUPERVISE_REPLICA, {**values, "supervision": as_json(supervision)})


def leave_replica(connection: Connection, replica: ReplicaRow) -> None:
    connection.execute(sql.LEAVE_REPLICA, (replica.deployment, replica.number))


def remove_replica(connection: Connection, replica: ReplicaRow) -> None:
    connection.execute(sql.REMOVE_REPLICA, (replica.deployment, replica.number))


def insert_model(connection: Connection, model: ModelRow) -> None:
    insert(connection, sql.INSERT_MODEL, model, what=f"model {model.id!r}")


def model(connection: Connection, account: str, model_id: str) -> ModelRow | None:
    return one(connection, sql.MODEL, (account, model_id), ModelRow)


def models(connection: Connection) -> list[ModelRow]:
    return every(connection, sql.MODELS, (), ModelRow)


def set_worker(connection: Connection, model: ModelRow, worker: ProcessRecord) -> None:
    values = {"worker": as_json(worker), "account": model.account, "id": model.id}
    connection.execute(sql.SET_WORKER, values)


def finish_model(connection: Connection, model: ModelRow, kind: ModelKind, digest: str) -> bool:
    values = {"kind": kind, "digest": digest, "account": model.account, "id": model.id}
    return changed(connection, sql.FINISH_MODEL, values)


def remove_model(connection: Connection, account: str, model_id: str) -> None:
    connection.execute(sql.REMOVE_MODEL, (account, model_id))


def insert_operation(connection: Connection, operation: OperationRow) -> None:
    connection.execute(sql.INSERT_OPERATION, columns(operation))


def operation(connection: Connection, name: str) -> OperationRow | None:
    return one(connection, sql.OPERATION, (name,), OperationRow)


def finish_operation(
    connection: Connection, name: str, *, error_code: str = "", error: str = ""
) -> None:
    values = {"name": name, "error_code": error_code, "error": error}
    connection.execute(sql.FINISH_OPERATION, values)


def insert_evaluation(connection: Connection, evaluation: EvaluationRow) -> None:
    connection.execute(sql.INSERT_EVALUATION, columns(evaluation))


def evaluations(connection: Connection, account: str) -> list[EvaluationRow]:
    return every(connection, sql.EVALUATIONS, (account,), EvaluationRow)


def insert_client_metrics(connection: Connection, metrics: ClientMetricsRow) -> None:
    connection.execute(sql.INSERT_CLIENT_METRICS, columns(metrics))


def client_metrics(connection: Connection, job_id: str) -> list[ClientMetricsRow]:
    return every(connection, sql.CLIENT_METRICS, (job_id,), ClientMetricsRow)
