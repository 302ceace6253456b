"""`homefire session finish SESSION`: ends what a client that is gone left open."""

from __future__ import annotations

import argparse

from homefire.cli.confirmation import confirmed
from homefire.cli.options import Commands, add_home, add_json, home_of
from homefire.cli.tables import print_json


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser("session", help="finish a session of the root Tinker plane")
    verbs = parser.add_subparsers(dest="verb", metavar="finish", required=True)
    leaf = verbs.add_parser(
        "finish",
        help="close a session and the models that it holds in a pooled trainer",
        description="`homefire status` shows the runs of all sessions, and whose client is silent.",
    )
    leaf.add_argument("session", metavar="SESSION", help="e.g. ts-3f9a1c2e4b50536f, or a run of it")
    leaf.add_argument("--yes", action="store_true", help="do not ask")
    add_home(leaf)
    add_json(leaf)
    leaf.set_defaults(run=run_finish)


def run_finish(arguments: argparse.Namespace) -> int:
    from homefire.cli.server import Server
    from homefire.wire.ids import check_name
    from homefire.wire.pooled import session_of

    session = check_name(session_of(arguments.session), field="session")
    question = f"finish session {session}? its models are closed; what they saved stays"
    if not (arguments.yes or confirmed(question)):
        return 1
    with Server(home_of(arguments)) as server:
        reason = {"type": "interrupted"}
        body = {"reason": reason, "detail": "finished by `homefire session finish`"}
        server.post(f"/api/v1/sessions/{session}/finish", body)
    if arguments.json:
        print_json({"finished": session})
    else:
        print(f"session {session} finished")
    return 0
