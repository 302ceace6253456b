"""Pages of lists: `pageSize` and `pageToken`, which is an offset that clients need not understand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from homefire.wire.errors import InvalidArgument

Item = TypeVar("Item")

DEFAULT_SIZE = 50
LARGEST_SIZE = 200


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


def integer(query: Mapping[str, str], name: str, *, default: int) -> int:
    text = query.get(name, "")
    if not text:
        return default
    # int() would take other scripts' digits, spaces and underscores too, and any length.
    if not text.lstrip("-").isascii() or not text.lstrip("-").isdigit() or len(text) > 18:
        raise InvalidArgument(f"{name} {text[:40]!r} is not an integer", field=name)
    return int(text)
