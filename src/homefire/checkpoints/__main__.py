"""`python -m homefire.checkpoints promote|remove SPEC`: the worker for long work on checkpoints."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from homefire.checkpoints.promote import run_worker
from homefire.checkpoints.removal import run_removal
from homefire.foundation.logs import configure


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m homefire.checkpoints")
    commands = parser.add_subparsers(dest="command", required=True)
    promotion = commands.add_parser("promote", help="make a model directory from a snapshot")
    promotion.add_argument("spec", type=Path, help="JSON file of a PromoteSpec")
    removal = commands.add_parser("remove", help="delete what a retention decision named")
    removal.add_argument("spec", type=Path, help="JSON file of a RemovalSpec")
    options = parser.parse_args(arguments)
    configure("checkpoints")
    run = {"promote": run_worker, "remove": run_removal}[options.command]
    return run(options.spec)


if __name__ == "__main__":
    sys.exit(main())
