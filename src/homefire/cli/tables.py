"""How commands print: a table for people, JSON for scripts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

_WIDEST = 1000
_WIDEST_COLUMN = 60


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Cells are text, never markup; an empty table says so in one line."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # Wider than any table: a name that is cut or folded cannot be copied, and the terminal wraps.
    console = Console(width=_WIDEST)
    if not rows:
        console.print(Text(f"{title}: none"))
        return
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(column, overflow="fold", max_width=_WIDEST_COLUMN)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)


def last_segment(name: str) -> str:
    """`accounts/local/deployments/serving` -> `serving`."""
    return name.rpartition("/")[2]


def size(num_bytes: float) -> str:
    """`1536` -> `1.5 KiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def short_digest(digest: str) -> str:
    return digest[:12]
