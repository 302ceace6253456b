"""Reading resource names that clients send."""

from __future__ import annotations

from homefire.wire.errors import InvalidArgument, NotFound
from homefire.wire.ids import check_name


def check_id(text: str, *, field: str) -> str:
    """An id for a new resource. A colon would read as a verb in a URL."""
    check_name(text, field=field)
    if ":" in text:
        raise InvalidArgument(
            f"{field} {text!r} holds a colon",
            hint="use letters, digits, '-', '_', '.'",
            field=field,
        )
    return text


def id_in(name: str, *, collection: str, account: str, field: str) -> str:
    """The id of `accounts/<account>/<collection>/<id>`, or of a bare `<id>`.

    Another account's resource does not exist for this one.
    """
    parts = name.split("/")
    if len(parts) == 1:
        return check_name(name, field=field)
    if len(parts) != 4 or parts[0] != "accounts" or parts[2] != collection:
        raise InvalidArgument(
            f"{field} {name[:200]!r} is not a resource name",
            hint=f"use accounts/{account}/{collection}/<id>",
            field=field,
        )
    if parts[1] != account:
        raise NotFound(f"{name} does not exist in account {account!r}", field=field)
    return check_name(parts[3], field=field)
