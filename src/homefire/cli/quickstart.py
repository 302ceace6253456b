"""`homefire quickstart`: hands its options to the quickstart, which knows them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from homefire.cli.options import Commands

Command = Callable[[], int]


def add_parser(commands: Commands) -> None:
    commands.add_parser(
        "quickstart",
        help="run the whole lifecycle: train, sync, sample, evaluate, branch",
        add_help=False,
    )


def run(words: Sequence[str]) -> int:
    from homefire.quickstart.main import main

    return main(list(words))
