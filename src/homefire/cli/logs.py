"""`homefire logs NAME`: the end of a service's log."""

from __future__ import annotations

import argparse

from homefire.cli.options import Commands, add_home, add_json, home_of
from homefire.cli.tables import print_json
from homefire.cli.tail import last_lines

_OWN_SERVICES = ("gateway", "control")
_DEFAULT_TAIL = 200


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser("logs", help="the end of a service's log")
    parser.add_argument(
        "name", metavar="NAME", help="gateway, control, a job id or a deployment id"
    )
    parser.add_argument(
        "--tail", type=int, default=_DEFAULT_TAIL, metavar="N", help="lines (default: %(default)s)"
    )
    add_home(parser)
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    name, tail = arguments.name, arguments.tail
    home = home_of(arguments)
    if name in _OWN_SERVICES:
        # From the file, since these logs are wanted most when nothing answers.
        lines = last_lines(home.run / f"{name}.log", tail)
    else:
        from homefire.cli.server import Server
        from homefire.wire.records import LogReport

        with Server(home) as server:
            lines = server.get_as(LogReport, f"/v1/homefire/logs/{name}", tail=tail).lines
    if arguments.json:
        print_json({"name": name, "lines": lines})
    else:
        print("\n".join(lines))
    return 0
