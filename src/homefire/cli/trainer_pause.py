"""`homefire trainer pause|resume JOB`: a job gives its room back, and goes on where it was."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from homefire.cli.options import Commands, add_home, add_json, home_of
from homefire.cli.tables import last_segment, print_json

if TYPE_CHECKING:
    from homefire.cli.server import Server

_DRAINS_WITHIN_S = 120.0
"""Above control's own patience, after which it kills: the journal has everything all the same."""
_STARTING = frozenset({"JOB_STATE_CREATING", "JOB_STATE_PENDING"})

Run = Callable[[argparse.Namespace], int]


def add_verbs(verbs: Commands) -> None:
    _add(
        verbs,
        "pause",
        run_pause,
        "stop a trainer behind a recovery point, and free its memory and threads",
        "The running operation finishes, a recovery point is written, the processes end. What was"
        " accepted and not run stays in the journal. Clients that wait are told so and keep waiting;"
        " the next operation of a client, or `homefire trainer resume`, goes on at the same step with"
        " the same bits.",
    )
    _add(
        verbs,
        "resume",
        run_resume,
        "go on with a trainer that was paused, cancelled or failed",
        "Starts it again at the step where it was. Where the machine has no room it is PENDING until"
        " there is some, and this command waits for it.",
    )


def _add(verbs: Commands, verb: str, run: Run, summary: str, description: str) -> None:
    leaf = verbs.add_parser(verb, help=summary, description=description)
    leaf.add_argument("name", metavar="JOB", help="id or resource name of the trainer job")
    leaf.add_argument("--no-wait", action="store_true", help="do not wait until it is done")
    add_home(leaf)
    add_json(leaf)
    leaf.set_defaults(run=run)


def run_pause(arguments: argparse.Namespace) -> int:
    """1 when its processes still run after two minutes."""
    from homefire.cli.server import Server

    with Server(home_of(arguments)) as server:
        path = _path(server, arguments.name)
        job = server.post(f"{path}:pause", {})
        ended = arguments.no_wait or _has_ended(server, path)
        job = job if arguments.no_wait else server.get(path)
    _show(arguments, job)
    return 0 if ended else 1


def run_resume(arguments: argparse.Namespace) -> int:
    """1 when it did not come up."""
    from homefire.cli.server import Server

    with Server(home_of(arguments)) as server:
        path = _path(server, arguments.name)
        job = server.post(f"{path}:resume", {})
        while job["state"] in _STARTING and not arguments.no_wait:
            job = server.get(path)  # held until its state changes
    _show(arguments, job)
    return 0 if arguments.no_wait or job["state"] == "JOB_STATE_RUNNING" else 1


def _has_ended(server: Server, path: str) -> bool:
    from homefire.wire.records import StatusReport

    deadline = time.monotonic() + _DRAINS_WITHIN_S
    while time.monotonic() < deadline:
        report = server.get_as(StatusReport, "/v1/homefire/status")
        if all(job.pid is None for job in report.jobs if path.endswith(job.name)):
            return True
        server.get(path)  # held until its processes have ended
    return False


def _path(server: Server, name: str) -> str:
    full = name if "/" in name else f"{server.account()}/rlorTrainerJobs/{name}"
    return f"/v1/{full}"


def _show(arguments: argparse.Namespace, job: dict[str, Any]) -> None:
    if arguments.json:
        print_json(job)
        return
    state = job["state"].removeprefix("JOB_STATE_")
    message = (job.get("status") or {}).get("message")
    print(f"{last_segment(job['name'])}: {state}{f' ({message})' if message else ''}")
