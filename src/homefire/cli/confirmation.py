"""Asking before something is lost."""

from __future__ import annotations

import sys


def confirmed(question: str) -> bool:
    """Asks on the terminal; where nobody can be asked, nothing is deleted without `--yes`."""
    from homefire.wire.errors import InvalidArgument

    if not sys.stdin.isatty():
        raise InvalidArgument("nobody is there to confirm the deletion", hint="add --yes")
    return input(f"{question} [y/N] ").strip().lower() in {"y", "yes"}
