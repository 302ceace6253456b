"""How far long work is, on standard error."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from homefire.cli.tables import size

if TYPE_CHECKING:
    from homefire.checkpoints.progress import Report


def progress_line(*, quiet: bool) -> Report:
    """A line per stage, rewritten on a terminal."""
    is_terminal = sys.stderr.isatty()
    last = ""

    def show(what: str, done: int, total: int) -> None:
        nonlocal last
        if quiet or (not is_terminal and what == last):
            return
        share = f" {done / total:.0%} of {_amount(total)}" if total else ""
        end = "\n" if not is_terminal or done == total else ""
        print(f"\r{what} …{share if is_terminal else ''}", end=end, file=sys.stderr, flush=True)
        last = what

    return show


def _amount(total: int) -> str:
    """Of bytes, or of a few things."""
    return size(total) if total >= 1024 else str(total)
