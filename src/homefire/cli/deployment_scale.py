"""`homefire deployment scale DEPLOYMENT N`: more or fewer replicas, none included."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from homefire.cli.options import Commands, add_home, add_json, home_of
from homefire.cli.tables import last_segment, print_json

if TYPE_CHECKING:
    from homefire.cli.server import Server

_CHANGING = frozenset({"CREATING", "UPDATING"})


def add_verb(verbs: Commands) -> None:
    leaf = verbs.add_parser(
        "scale",
        help="set how many replicas a deployment has",
        description=(
            "New replicas load the weights that the deployment serves before they answer; those that go"
            " finish what runs. With 0 none is left until the next request or hot load, which starts"
            " as many as the deployment's minimum, at least one."
        ),
    )
    leaf.add_argument("name", metavar="DEPLOYMENT", help="id or resource name of the deployment")
    leaf.add_argument("replicas", metavar="N", type=_count, help="replicas wanted")
    leaf.add_argument("--no-wait", action="store_true", help="do not wait until it is done")
    add_home(leaf)
    add_json(leaf)
    leaf.set_defaults(run=run_scale)


def run_scale(arguments: argparse.Namespace) -> int:
    """1 when the deployment failed."""
    from homefire.cli.server import Server

    with Server(home_of(arguments)) as server:
        path = _path(server, arguments.name)
        if arguments.replicas > server.get(path)["maxReplicaCount"]:
            server.patch(path, {"maxReplicaCount": arguments.replicas})
        deployment = server.patch(f"{path}:scale", {"replicaCount": arguments.replicas})
        while deployment["state"] in _CHANGING and not arguments.no_wait:
            deployment = server.get(path)  # held until its state changes
    _show(arguments, deployment)
    return 1 if deployment["state"] == "FAILED" else 0


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of replicas: use 0, 1, 2, …")
    return int(text)


def _path(server: Server, name: str) -> str:
    full = name if "/" in name else f"{server.account()}/deployments/{name}"
    return f"/v1/{full}"


def _show(arguments: argparse.Namespace, deployment: dict[str, Any]) -> None:
    if arguments.json:
        print_json(deployment)
        return
    ready = deployment["replicaStats"]["readyReplicaCount"]
    wanted = deployment["desiredReplicaCount"]
    message = (deployment.get("status") or {}).get("message")
    why = f" ({message})" if message and ready != wanted else ""
    name, state = last_segment(deployment["name"]), deployment["state"]
    print(f"{name}: {state}, {ready} of {wanted} replicas ready{why}")
