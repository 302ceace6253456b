"""`rlorTrainerJobs`: trainer jobs, their checkpoints and their records."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from homefire.control.db.rows import JobRow
from homefire.control.endpoints import LIST_QUERY, Endpoint
from homefire.control.listing import Listing
from homefire.control.paging import Page
from homefire.control.plane import ControlPlane
from homefire.control.presentation import checkpoint_row, job_resource
from homefire.control.routes.accounts import own_account
from homefire.http.bodies import json_response, read_json
from homefire.wire.errors import Unsupported
from homefire.wire.records import Lineage, MetricsEntry, MetricsRecord, MetricsRow
from homefire.wire.resources import (
    CheckpointList,
    CheckpointRow,
    TrainerJob,
    TrainerJobList,
    TrainerJobRequest,
)
from homefire.wire.retention import PruneReport, PruneRequest, RetentionPolicy

_ALL = "/v1/accounts/{account}/rlorTrainerJobs"
_ONE = f"{_ALL}/{{job}}"


async def create(plane: ControlPlane, request: Request) -> Response:
    account, query = own_account(request), request.query_params
    job = await plane.jobs.create(
        account,
        await read_json(request, TrainerJobRequest),
        job_id=query.get("rlorTrainerJobId"),
        training_shape=query.get("trainingShape"),
        deployment_id=query.get("deploymentId"),
    )
    await plane.until_routed(account, job.id)
    return _answer(plane, job)


async def list_jobs(plane: ControlPlane, request: Request) -> Response:
    asked = Listing.of(request.query_params)
    jobs = await plane.jobs.list(own_account(request), tombstones=asked.shows_deleted)
    found = asked.apply([_resource(plane, job) for job in jobs])
    return json_response(
        TrainerJobList(
            rlor_trainer_jobs=found.items,
            next_page_token=found.next_page_token,
            total_size=found.total_size,
        )
    )


async def get(plane: ControlPlane, request: Request) -> Response:
    job = await plane.held_job(own_account(request), request.path_params["job"])
    await plane.observations.refresh_trainer(job.id)
    return _answer(plane, job)


async def delete(plane: ControlPlane, request: Request) -> Response:
    await plane.jobs.delete(own_account(request), request.path_params["job"])
    return json_response({})


async def cancel(plane: ControlPlane, request: Request) -> Response:
    return _answer(plane, await plane.jobs.cancel(own_account(request), request.path_params["job"]))


async def pause(plane: ControlPlane, request: Request) -> Response:
    return _answer(plane, await plane.jobs.pause(own_account(request), request.path_params["job"]))


async def resume(plane: ControlPlane, request: Request) -> Response:
    return _answer(plane, await plane.jobs.resume(own_account(request), request.path_params["job"]))


async def execute_train_step(plane: ControlPlane, request: Request) -> Response:
    await _job(plane, request)
    raise Unsupported(
        "executeTrainStep belongs to the hosted service's managed fine-tuning",
        hint="drive the trainer through its own endpoint with forward_backward and optim_step",
    )


async def list_checkpoints(plane: ControlPlane, request: Request) -> Response:
    page = Page.of(request.query_params)
    manifests = await plane.records.checkpoints(await _job(plane, request))
    items, following = page.cut(manifests)
    rows = [checkpoint_row(manifest) for manifest in items]
    return json_response(CheckpointList(checkpoints=rows, next_page_token=following))


async def delete_checkpoint(plane: ControlPlane, request: Request) -> Response:
    job = await _job(plane, request)
    await plane.records.delete_checkpoint(job, request.path_params["checkpoint"])
    return json_response({})


async def pin_checkpoint(plane: ControlPlane, request: Request) -> Response:
    return await _pin(plane, request, pinned=True)


async def unpin_checkpoint(plane: ControlPlane, request: Request) -> Response:
    return await _pin(plane, request, pinned=False)


async def prune_checkpoints(plane: ControlPlane, request: Request) -> Response:
    job, asked = await _job(plane, request), await read_json(request, PruneRequest)
    report = await plane.retention.prune(job, policy=asked.policy, dry_run=asked.dry_run)
    return json_response(report)


async def get_retention(plane: ControlPlane, request: Request) -> Response:
    return json_response((await _job(plane, request)).config.retention)


async def set_retention(plane: ControlPlane, request: Request) -> Response:
    job, policy = await _job(plane, request), await read_json(request, RetentionPolicy)
    return json_response((await plane.retention.set_policy(job, policy)).config.retention)


async def get_metrics(plane: ControlPlane, request: Request) -> Response:
    return json_response(MetricsRecord(await plane.records.metrics(await _job(plane, request))))


async def add_metrics(plane: ControlPlane, request: Request) -> Response:
    job = await _job(plane, request)
    entry = await read_json(request, MetricsEntry)
    return json_response(await plane.records.add_metrics(job, entry))


async def get_lineage(plane: ControlPlane, request: Request) -> Response:
    return json_response(await plane.records.lineage(await _job(plane, request)))


async def _pin(plane: ControlPlane, request: Request, *, pinned: bool) -> Response:
    job, name = await _job(plane, request), request.path_params["checkpoint"]
    return json_response(
        checkpoint_row(await plane.records.pin_checkpoint(job, name, pinned=pinned))
    )


async def _job(plane: ControlPlane, request: Request) -> JobRow:
    return await plane.jobs.get(own_account(request), request.path_params["job"])


def _answer(plane: ControlPlane, job: JobRow) -> Response:
    return json_response(_resource(plane, job))


def _resource(plane: ControlPlane, job: JobRow) -> TrainerJob:
    return job_resource(job, plane.observations.trainer(job).status, store=plane.home.store_root)


ENDPOINTS = [
    Endpoint(
        "POST",
        _ALL,
        create,
        "Create a trainer job; it is waited for separately",
        TrainerJob,
        TrainerJobRequest,
        query=("rlorTrainerJobId", "trainingShape", "deploymentId", "skipValidations"),
    ),
    Endpoint(
        "GET",
        _ALL,
        list_jobs,
        "Jobs, oldest first; tombstones with `showDeleted`",
        TrainerJobList,
        query=LIST_QUERY,
    ),
    Endpoint("POST", f"{_ONE}:cancel", cancel, "Stop behind a recovery point", TrainerJob),
    Endpoint(
        "POST",
        f"{_ONE}:pause",
        pause,
        "Give its room back behind a recovery point; the next operation or `:resume` goes on",
        TrainerJob,
    ),
    Endpoint("POST", f"{_ONE}:resume", resume, "Go on where the job stopped", TrainerJob),
    Endpoint("POST", f"{_ONE}:executeTrainStep", execute_train_step, "Refused by name"),
    Endpoint("GET", _ONE, get, "One job; held while it is in transition", TrainerJob),
    Endpoint("DELETE", _ONE, delete, "Delete, leaving a tombstone with its checkpoints"),
    Endpoint(
        "GET",
        f"{_ONE}/checkpoints",
        list_checkpoints,
        "Snapshots and states, oldest first, also of a deleted job",
        CheckpointList,
        query=("pageSize", "pageToken"),
    ),
    Endpoint(
        "DELETE",
        f"{_ONE}/checkpoints/{{checkpoint}}",
        delete_checkpoint,
        "Delete one that nothing rests on",
    ),
    Endpoint(
        "POST",
        f"{_ONE}/checkpoints:prune",
        prune_checkpoints,
        "Apply the retention policy now, or show what it would do with `dryRun`",
        PruneReport,
        PruneRequest,
    ),
    Endpoint(
        "POST",
        f"{_ONE}/checkpoints/{{checkpoint}}:pin",
        pin_checkpoint,
        "Keep a checkpoint whatever its age",
        CheckpointRow,
    ),
    Endpoint(
        "POST",
        f"{_ONE}/checkpoints/{{checkpoint}}:unpin",
        unpin_checkpoint,
        "Let retention decide again",
        CheckpointRow,
    ),
    Endpoint("GET", f"{_ONE}/retention", get_retention, "Which checkpoints stay", RetentionPolicy),
    Endpoint(
        "PUT",
        f"{_ONE}/retention",
        set_retention,
        "Set which checkpoints stay, also of a deleted job",
        RetentionPolicy,
        RetentionPolicy,
    ),
    Endpoint("GET", f"{_ONE}/metrics", get_metrics, "The job's record", MetricsRecord),
    Endpoint("POST", f"{_ONE}/metrics", add_metrics, "Add to the record", MetricsRow, MetricsEntry),
    Endpoint("GET", f"{_ONE}/lineage", get_lineage, "What came from what", Lineage),
]
