"""`homefire version`."""

from __future__ import annotations

import argparse

from homefire import __version__
from homefire.cli.options import Commands, add_json


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser("version", help="print the version")
    add_json(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    print(f'{{"version": "{__version__}"}}' if arguments.json else f"homefire {__version__}")
    return 0
