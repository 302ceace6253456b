"""Where a home keeps its checkpoints, when `homefire up` starts on it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from homefire.foundation.home import Home


def check_store(home: Home, asked: str | None) -> None:
    """Remembers the store that was asked for, and refuses at once one that cannot be reached.

    InvalidArgument when the home's checkpoints are somewhere else already: they would vanish.
    """
    from homefire.checkpoints import is_object_store, open_store
    from homefire.foundation.durable import write_file
    from homefire.wire.errors import InvalidArgument
    from homefire.wire.ids import DEFAULT_ACCOUNT

    known = home.store_root
    if asked is not None and asked != known:
        if is_object_store(known) or any(home.store.glob("*/*/*/*/*/manifest.json")):
            raise InvalidArgument(
                f"the checkpoints of this home are in {known}, not in {asked}",
                hint="leave --store out, or use another home with --home",
                field="store",
            )
        if not is_object_store(asked):
            raise InvalidArgument(
                f"--store {asked!r} is no bucket",
                hint="write s3://bucket/prefix; without --store the home's directory is used",
                field="store",
            )
    root = asked or known
    if is_object_store(root):
        open_store(root).jobs(DEFAULT_ACCOUNT)
        if not home.store_url_file.exists():
            write_file(home.store_url_file, f"{root}\n".encode())
