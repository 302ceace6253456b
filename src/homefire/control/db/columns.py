"""Rows as structs: what the functions of all tables share. A struct's fields are its columns."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from homefire.wire.errors import AlreadyExists

Connection = sqlite3.Connection
Row = TypeVar("Row")

_JSON_COLUMNS = {
    "config",
    "supervision",
    "desired",
    "source",
    "worker",
    "entry",
    "metrics",
    "tags",
    "user_metadata",
}
_BOOLEAN_COLUMNS = {"purge", "leaving", "done"}


def insert(connection: Connection, statement: str, row: msgspec.Struct, *, what: str) -> None:
    try:
        connection.execute(statement, columns(row))
    except sqlite3.IntegrityError as exc:
        raise AlreadyExists(f"{what} exists", hint="use it, or choose another id") from exc


def one(
    connection: Connection, statement: str, values: tuple[Any, ...], kind: type[Row]
) -> Row | None:
    row = connection.execute(statement, values).fetchone()
    return None if row is None else decoded(row, kind)


def every(
    connection: Connection, statement: str, values: tuple[Any, ...], kind: type[Row]
) -> list[Row]:
    return [decoded(row, kind) for row in connection.execute(statement, values)]


def changed(connection: Connection, statement: str, values: Mapping[str, Any]) -> bool:
    """Whether the guard of the statement held."""
    return connection.execute(statement, values).rowcount == 1


def decoded(row: sqlite3.Row, kind: type[Row]) -> Row:
    values = {name: _decoded_column(name, value) for name, value in dict(row).items()}
    return msgspec.convert(values, kind)


def columns(row: msgspec.Struct) -> dict[str, Any]:
    values = msgspec.structs.asdict(row)
    return {
        name: as_json(value) if name in _JSON_COLUMNS and value is not None else value
        for name, value in values.items()
    }


def as_json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _decoded_column(name: str, value: Any) -> Any:
    if name in _BOOLEAN_COLUMNS:
        return bool(value)
    return msgspec.json.decode(value) if name in _JSON_COLUMNS and value is not None else value
