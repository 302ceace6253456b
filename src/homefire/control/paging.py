"""Pages of lists: `pageSize` and `pageToken`, an offset that clients need not understand; the Tinker
protocol says `limit` and `offset`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from homefire.wire.errors import InvalidArgument

Item = TypeVar("Item")

DEFAULT_SIZE = 50
LARGEST_SIZE = 200
LARGEST_LIMIT = 1000
"""The command line of tinker asks for a thousand checkpoints at a time."""


@dataclass(frozen=True)
class Page:
    offset: int
    size: int

    @classmethod
    def of(cls, query: Mapping[str, str]) -> Page:
        size = integer(query, "pageSize", default=0)
        if size < 0:
            raise InvalidArgument("pageSize is negative", field="pageSize")
        offset = integer(query, "pageToken", default=0)
        if offset < 0:
            raise InvalidArgument("pageToken is not one that was given out", field="pageToken")
        return cls(offset, min(size or DEFAULT_SIZE, LARGEST_SIZE))

    def cut(self, items: Sequence[Item]) -> tuple[list[Item], str]:
        """The items of this page, and the token of the next one; empty behind the last."""
        end = self.offset + self.size
        return list(items[self.offset : end]), str(end) if end < len(items) else ""


@dataclass(frozen=True)
class Window:
    """Example: Window(offset=40, limit=20) of 57 items are the last 17."""

    offset: int
    limit: int

    @classmethod
    def of(cls, query: Mapping[str, str], *, default: int) -> Window:
        limit = integer(query, "limit", default=default)
        if not 1 <= limit <= LARGEST_LIMIT:
            raise InvalidArgument(
                f"limit is {limit}", hint=f"use 1 to {LARGEST_LIMIT}", field="limit"
            )
        offset = integer(query, "offset", default=0)
        if offset < 0:
            raise InvalidArgument(f"offset is {offset}", hint="use 0 or more", field="offset")
        return cls(offset, limit)

    def cut(self, items: Sequence[Item]) -> list[Item]:
        return list(items[self.offset : self.offset + self.limit])


def integer(query: Mapping[str, str], name: str, *, default: int) -> int:
    text = query.get(name, "")
    if not text:
        return default
    # int() would take other scripts' digits, spaces and underscores too, and any length.
    if not text.lstrip("-").isascii() or not text.lstrip("-").isdigit() or len(text) > 18:
        raise InvalidArgument(f"{name} {text[:40]!r} is not an integer", field=name)
    return int(text)
