"""`homefire status`: jobs, deployments, the weights that each replica serves, runs, capacity."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from homefire.cli.options import Commands, add_home, add_json, home_of
from homefire.cli.tables import last_segment, print_json, print_table, short_digest, size

if TYPE_CHECKING:
    from homefire.wire.records import (
        CapacityReport,
        DeploymentReport,
        JobReport,
        RunReport,
        StatusReport,
    )

_LIVE_S = 60.0
"""Clients send a heartbeat every 10 s."""


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "status", help="jobs, deployments, the weights each replica serves, capacity"
    )
    add_home(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from homefire.cli.server import Server
    from homefire.wire.records import StatusReport

    with Server(home_of(arguments)) as server:
        if arguments.json:
            print_json(server.get("/v1/homefire/status"))
        else:
            print_report(server.get_as(StatusReport, "/v1/homefire/status"))
    return 0


def print_report(report: StatusReport) -> None:
    print(f"homefire {report.version} at {report.url}, home {report.home}\n")
    print_table(
        "trainer jobs",
        (
            "job",
            "state",
            "base model",
            "mode",
            "ranks",
            "step",
            "applied",
            "a crash replays",
            "restarts",
            "graphs",
            "note",
        ),
        [_job_row(job) for job in report.jobs],
    )
    print_table(
        "deployments",
        (
            "deployment",
            "state",
            "replica",
            "serves",
            "digest",
            "canary",
            "loading",
            "running",
            "note",
        ),
        [row for deployment in report.deployments for row in _deployment_rows(deployment)],
    )
    if report.runs:
        print_table(
            "training runs of the root Tinker plane",
            ("run", "session", "job", "base model", "rank", "client"),
            [_run_row(run) for run in report.runs],
        )
    print_capacity(report.capacity)


def _run_row(run: RunReport) -> list[str]:
    is_live = run.silent_s < _LIVE_S
    return [
        run.run,
        run.session_name or "",
        run.job,
        run.base_model,
        str(run.lora_rank) if run.lora_rank else "full",
        "there" if is_live else f"silent for {run.silent_s:.0f} s",
    ]


def _job_row(job: JobReport) -> list[str]:
    return [
        last_segment(job.name),
        job.state.removeprefix("JOB_STATE_"),
        last_segment(job.base_model),
        job.mode,
        str(job.ranks),
        str(job.step),
        f"{job.num_applied} of {job.num_accepted}",
        f"{job.num_unsaved} operations",
        f"{job.restarts}, engine {job.engine_restarts}",
        f"{size(job.held_graph_bytes)} of {size(job.held_graph_budget_bytes)}",
        job.message or job.detail,
    ]


def _deployment_rows(deployment: DeploymentReport) -> list[list[str]]:
    name, state = last_segment(deployment.name), deployment.state
    if not deployment.replicas:
        return [[name, state, "-", "-", "-", "-", "-", "-", deployment.message]]
    return [
        [
            name,
            state,
            str(replica.replica) if replica.ready else f"{replica.replica} (not ready)",
            replica.identity or "base",
            short_digest(replica.digest),
            replica.canary or "-",
            _loading(deployment, replica.stage),
            f"{replica.running} + {replica.queued} queued",
            replica.error or deployment.message,
        ]
        for replica in deployment.replicas
    ]


def _loading(deployment: DeploymentReport, stage: str) -> str:
    return stage if stage == "idle" else f"{stage} {deployment.desired_identity or 'base'}"


def print_capacity(capacity: CapacityReport) -> None:
    print(
        f"capacity: {capacity.threads_used} of {capacity.threads_total} engine threads, "
        f"{size(capacity.memory_used_bytes)} of {size(capacity.memory_total_bytes)} memory"
    )
    for name in capacity.waiting:
        print(f"  waiting for room: {name}")
