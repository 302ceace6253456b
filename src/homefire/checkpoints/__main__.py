"""`python -m homefire.checkpoints promote SPEC`: the worker for long work on checkpoints."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from homefire.checkpoints.promote import run_worker
from homefire.foundation.logs import configure


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m homefire.checkpoints")
    commands = parser.add_subparsers(dest="command", required=True)
    promotion = commands.add_parser("promote", help="make a model directory from a snapshot")
    promotion.add_argument("spec", type=Path, help="JSON file of a PromoteSpec")
    options = parser.parse_args(arguments)
    configure("checkpoints")
    return run_worker(options.spec)


if __name__ == "__main__":
    sys.exit(main())
