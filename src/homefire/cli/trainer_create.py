"""`homefire trainer create`: a trainer job, without a line of Python."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from homefire.cli.options import Commands, add_home, add_json, home_of
from homefire.cli.tables import last_segment, print_json

if TYPE_CHECKING:
    from homefire.cli.server import Server

Row = dict[str, Any]
_STARTING = ("JOB_STATE_PENDING", "JOB_STATE_CREATING")


def add_verb(verbs: Commands) -> None:
    leaf = verbs.add_parser(
        "create",
        help="create a trainer job",
        description="Creates a trainer job and returns; clients train it over the Tinker protocol at"
        " /training/v1/rlorTrainerJobs/ACCOUNT/JOB. What the machine has no room for waits as PENDING"
        " and says for what.",
    )
    leaf.add_argument("name", metavar="JOB", nargs="?", help="its id; one is made up when left out")
    leaf.add_argument("--base-model", metavar="MODEL", help="e.g. tiny; see `homefire model list`")
    leaf.add_argument("--shape", help="a training shape; see `homefire shape list`")
    leaf.add_argument(
        "--ranks",
        type=int,
        metavar="N",
        help="processes of its engine, each with a part of every parameter and of every batch's"
        " rows (default: the shape's, or 1). Fixed for the job: another number sums in another"
        " order. Its checkpoints load on any number",
    )
    leaf.add_argument(
        "--lora-rank", type=int, default=0, metavar="R", help="0 (default) trains all parameters"
    )
    leaf.add_argument("--forward-only", action="store_true", help="a frozen reference model")
    leaf.add_argument("--max-context-length", type=int, metavar="TOKENS", help="of one row")
    leaf.add_argument("--display-name", metavar="TEXT")
    leaf.add_argument("--wait", action="store_true", help="until it runs, or has failed")
    add_home(leaf)
    add_json(leaf)
    leaf.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """1 when it was waited for and does not run."""
    from homefire.cli.server import Server

    with Server(home_of(arguments)) as server:
        job = _create(server, arguments)
        if arguments.wait:
            job = _wait(server, job)
    if arguments.json:
        print_json(job)
    else:
        _print(job)
    return 0 if not arguments.wait or job["state"] == "JOB_STATE_RUNNING" else 1


def _create(server: Server, arguments: argparse.Namespace) -> Row:
    query = {"rlorTrainerJobId": arguments.name, "trainingShape": _shape(server, arguments.shape)}
    given = {name: value for name, value in query.items() if value}
    return server.post(f"/v1/{server.account()}/rlorTrainerJobs", _body(arguments), **given)


def _shape(server: Server, name: str | None) -> str | None:
    """The full resource name."""
    if name is None or "/" in name:
        return name
    return f"{server.account()}/trainingShapes/{name}"


def _body(arguments: argparse.Namespace) -> Row:
    training = {
        "baseModel": arguments.base_model,
        "loraRank": arguments.lora_rank,
        "maxContextLength": arguments.max_context_length,
        "acceleratorCount": arguments.ranks,
    }
    body = {"trainingConfig": {n: v for n, v in training.items() if v is not None}}
    more = {"displayName": arguments.display_name, "forwardOnly": arguments.forward_only or None}
    return {**body, **{name: value for name, value in more.items() if value is not None}}


def _wait(server: Server, job: Row) -> Row:
    """Each look is held by the server until the job changes. What it waits for goes to stderr."""
    told = ""
    while job["state"] in _STARTING:
        message = job["status"]["message"]
        if message and message != told:
            print(message, file=sys.stderr)
            told = message
        job = server.get(f"/v1/{job['name']}")
    return job


def _print(job: Row) -> None:
    name, state = last_segment(job["name"]), job["state"].removeprefix("JOB_STATE_")
    ranks = job.get("engineRanks", 1)
    divided = f", {ranks} engine ranks" if ranks > 1 else ""
    print(f"trainer job {name} is {state}{divided}")
    if message := job["status"]["message"]:
        print(f"  {message}")
