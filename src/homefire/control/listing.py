"""Lists as clients ask for them: `filter`, `orderBy`, then a page. Pure.

    filter=state="JOB_STATE_RUNNING" AND training_config.lora_rank>=8
    orderBy=create_time desc,name

The part of AIP-160 that a list of a few hundred resources needs: comparisons joined by AND. Anything
else is refused, since a filter that is not applied gives wrong data.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import eq, ge, gt, le, lt, ne
from typing import Any, Generic, TypeVar, cast

import msgspec

from homefire.control.paging import Page
from homefire.wire.errors import InvalidArgument

Resource = TypeVar("Resource", bound=msgspec.Struct)
Scalar = str | float | bool

_COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "<=": le,
    ">=": ge,
    "!=": ne,
    "=": eq,
    "<": lt,
    ">": gt,
}
_CONDITION = re.compile(r"""\s*([A-Za-z][\w.]*)\s*(<=|>=|!=|=|<|>)\s*("[^"]*"|[^\s"]+)\s*""")
_ORDERING = re.compile(r"\s*([A-Za-z][\w.]*)(\s+(?:asc|desc))?\s*")


@dataclass(frozen=True)
class Condition:
    field: str
    """A path in camelCase, e.g. `trainingConfig.loraRank`."""
    operator: str
    operand: str

    def holds(self, document: Mapping[str, Any]) -> bool:
        value = _value(document, self.field, parameter="filter")
        if value is None:
            return self.operator == "!="
        return _COMPARISONS[self.operator](value, _like(value, self))


@dataclass(frozen=True)
class Ordering:
    field: str
    descending: bool


@dataclass(frozen=True)
class Listed(Generic[Resource]):
    items: list[Resource]
    next_page_token: str
    total_size: int


@dataclass(frozen=True)
class Listing:
    conditions: tuple[Condition, ...]
    orderings: tuple[Ordering, ...]
    page: Page
    shows_deleted: bool

    @classmethod
    def of(cls, query: Mapping[str, str]) -> Listing:
        return cls(
            conditions=_conditions(query.get("filter", "")),
            orderings=_orderings(query.get("orderBy", "")),
            page=Page.of(query),
            shows_deleted=query.get("showDeleted", "").lower() == "true",
        )

    def apply(self, resources: Sequence[Resource]) -> Listed[Resource]:
        """Keeps the order given where `orderBy` says nothing."""
        documents = [(_document(resource), resource) for resource in resources]
        kept = [pair for pair in documents if all(c.holds(pair[0]) for c in self.conditions)]
        for ordering in reversed(self.orderings):
            kept.sort(key=lambda pair: _rank(pair[0], ordering), reverse=ordering.descending)
        items, following = self.page.cut([resource for _, resource in kept])
        return Listed(items, following, len(kept))


def _conditions(text: str) -> tuple[Condition, ...]:
    if not text.strip():
        return ()
    parts = re.split(r"\s+AND\s+", text)
    found = [_CONDITION.fullmatch(part) for part in parts]
    for part, match in zip(parts, found, strict=True):
        if match is None:
            raise InvalidArgument(
                f"filter {part[:100]!r} is not understood",
                hint='compare fields with = != < <= > >=, joined by AND: state="READY"',
                field="filter",
            )
    return tuple(
        Condition(_camel(match[1]), match[2], match[3].strip('"')) for match in found if match
    )


def _orderings(text: str) -> tuple[Ordering, ...]:
    if not text.strip():
        return ()
    orderings: list[Ordering] = []
    for part in text.split(","):
        match = _ORDERING.fullmatch(part)
        if match is None:
            raise InvalidArgument(
                f"orderBy {part[:100]!r} is not understood",
                hint="name fields, each with an optional ' desc': create_time desc,name",
                field="orderBy",
            )
        orderings.append(Ordering(_camel(match[1]), (match[2] or "").strip() == "desc"))
    return tuple(orderings)


def _camel(path: str) -> str:
    return re.sub(r"_([a-z0-9])", lambda letter: letter[1].upper(), path)


def _document(resource: msgspec.Struct) -> Mapping[str, Any]:
    return cast("Mapping[str, Any]", msgspec.to_builtins(resource))


def _value(document: Mapping[str, Any], field: str, *, parameter: str) -> Scalar | None:
    value: Any = document
    for name in field.split("."):
        if value is None:
            return None
        if not isinstance(value, Mapping) or name not in value:
            raise InvalidArgument(
                f"{parameter} names {field!r}, which these resources do not have",
                hint=f"fields: {', '.join(sorted(document))}",
                field=parameter,
            )
        value = cast("Mapping[str, Any]", value)[name]
    if isinstance(value, Mapping | list):
        raise InvalidArgument(
            f"{parameter} names {field!r}, which is not a single value", field=parameter
        )
    return cast("Scalar | None", value)


def _like(value: Scalar, condition: Condition) -> Scalar:
    """The operand as the kind of the value that it is compared with."""
    if isinstance(value, str):
        return condition.operand
    try:
        if isinstance(value, bool):
            return {"true": True, "false": False}[condition.operand.lower()]
        return float(condition.operand)
    except (KeyError, ValueError) as exc:
        raise InvalidArgument(
            f"filter compares {condition.field!r} with {condition.operand[:100]!r}",
            hint=f"its values are like {value!r}",
            field="filter",
        ) from exc


def _rank(document: Mapping[str, Any], ordering: Ordering) -> tuple[bool, Scalar]:
    """What is absent comes first."""
    value = _value(document, ordering.field, parameter="orderBy")
    return (False, "") if value is None else (True, value)
