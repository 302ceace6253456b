"""Options that several commands share."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from homefire.foundation.home import Home

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""What `add_subparsers` returns; argparse has no public name for it."""


def add_home(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--home",
        type=Path,
        metavar="DIR",
        help="homefire's directory (default: $HOMEFIRE_HOME, else ~/.homefire)",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def home_of(arguments: argparse.Namespace) -> Home:
    from homefire.foundation.home import Home

    root: Path = arguments.home or Home.default()
    return Home(root.expanduser().absolute())
