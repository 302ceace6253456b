"""`homefire`: which command was asked for, and how its errors are shown."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from homefire.cli import (
    env,
    evaluations,
    lineage,
    logs,
    quickstart,
    resources,
    sessions,
    status,
    up,
    version,
)

EPILOG = """\
examples:
  homefire up                            start homefire in the foreground (Ctrl-C stops it)
  eval "$(homefire env)"                 let the clients in this shell find it
  homefire status                        jobs, deployments, the weights they serve, capacity
  homefire quickstart                    the whole lifecycle on this machine, in minutes
  homefire checkpoint list --job JOB     what a job has saved, and where it was served
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="homefire",
        description="The training-and-sampling lifecycle for research loops, on your own hardware.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for module in (
        up,
        env,
        status,
        quickstart,
        resources,
        lineage,
        evaluations,
        sessions,
        logs,
        version,
    ):
        module.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 failed (the reason is on standard error), 2 wrong usage."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["quickstart"]:
        return _run(lambda: quickstart.run(words[1:]))
    arguments = build_parser().parse_args(words)
    return _run(lambda: arguments.run(arguments))


def _run(command: quickstart.Command) -> int:
    from homefire.wire.errors import HomefireError

    try:
        return command()
    except HomefireError as exc:
        print(f"error: {exc.message}", file=sys.stderr)
        if exc.hint:
            print(f"hint: {exc.hint}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
