"""`homefire trainer|deployment|checkpoint|model|shape list|get|delete`; trainer jobs and deployments have more verbs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from homefire.cli import (
    checkpoints,
    deployment_scale,
    trainer_create,
    trainer_pause,
    trainer_replay,
)
from homefire.cli.confirmation import confirmed
from homefire.cli.options import Commands, add_home, add_json, home_of
from homefire.cli.tables import last_segment, print_json, print_table

if TYPE_CHECKING:
    from homefire.cli.server import Server

Row = dict[str, Any]


@dataclass(frozen=True)
class Column:
    title: str
    cell: Callable[[Row], Any]


@dataclass(frozen=True)
class ResourceKind:
    """How one kind of resource is listed, found and deleted over the public API."""

    command: str
    noun: str
    collection: str
    """Its segment in paths and resource names, and the field of the list answer."""
    columns: tuple[Column, ...]
    delete_warning: str = ""
    """What a deletion means; empty where nothing can be deleted."""
    no_delete: str = ""
    """Why nothing can be deleted."""


def _value(*keys: str) -> Callable[[Row], Any]:
    def cell(row: Row) -> Any:
        value: Any = row
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    return cell


_NAME = Column("name", lambda row: last_segment(row["name"]))
_CREATED = Column("created", lambda row: str(row.get("createTime", ""))[:19])
_NOTE = Column("note", _value("status", "message"))

KINDS = (
    ResourceKind(
        "trainer",
        "trainer job",
        "rlorTrainerJobs",
        (
            _NAME,
            Column("state", lambda row: row["state"].removeprefix("JOB_STATE_")),
            Column("base model", _value("trainingConfig", "baseModel")),
            Column("mode", _value("trainerMode")),
            Column("ranks", _value("engineRanks")),
            _CREATED,
            _NOTE,
        ),
        delete_warning="its trainer stops; its checkpoints can still be listed and promoted",
    ),
    ResourceKind(
        "deployment",
        "deployment",
        "deployments",
        (
            _NAME,
            Column("state", _value("state")),
            Column("base model", _value("baseModel")),
            Column("replicas", _value("replicaCount")),
            Column("trainer", lambda row: last_segment(row.get("hotLoadTrainerJob") or "-")),
            _CREATED,
            _NOTE,
        ),
        delete_warning="its replicas stop",
    ),
    ResourceKind(
        "model",
        "model",
        "models",
        (
            Column("name", _value("name")),
            Column("state", _value("state")),
            Column("kind", _value("kind")),
            Column("source", _value("source")),
            Column("context", _value("baseModelDetails", "maxContextLength")),
        ),
        delete_warning="its files are removed",
    ),
    ResourceKind(
        "shape",
        "training shape",
        "trainingShapes",
        (
            Column("name", _value("name")),
            Column("base model", _value("snapshot", "baseModel")),
            Column("mode", _value("snapshot", "trainerMode")),
            Column("accelerator", _value("snapshot", "acceleratorType")),
            Column("count", _value("snapshot", "acceleratorCount")),
            Column("context", _value("snapshot", "maxSupportedContextLength")),
        ),
        no_delete="training shapes are generated from what this machine has",
    ),
)


def add_parser(commands: Commands) -> None:
    for kind in KINDS:
        verbs = _add_kind(commands, kind)
        if kind.command == "trainer":
            trainer_create.add_verb(verbs)
            trainer_pause.add_verbs(verbs)
            trainer_replay.add_verb(verbs)
        if kind.command == "deployment":
            deployment_scale.add_verb(verbs)
    checkpoints.add_parser(commands)


def _add_kind(commands: Commands, kind: ResourceKind) -> Commands:
    parser = commands.add_parser(kind.command, help=f"list, get or delete {kind.noun}s")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for verb, run in (("list", run_list), ("get", run_get), ("delete", run_delete)):
        leaf = verbs.add_parser(verb, help=f"{verb} {kind.noun}{'s' if verb == 'list' else ''}")
        if verb != "list":
            leaf.add_argument("name", metavar="NAME", help="an id or a full resource name")
        if verb == "delete":
            leaf.add_argument("--yes", action="store_true", help="do not ask")
        add_home(leaf)
        add_json(leaf)
        leaf.set_defaults(run=run, kind=kind)
    return verbs


def run_list(arguments: argparse.Namespace) -> int:
    from homefire.cli.server import Server

    kind: ResourceKind = arguments.kind
    with Server(home_of(arguments)) as server:
        rows = server.list_all(f"/v1/{server.account()}/{kind.collection}", kind.collection)
    if arguments.json:
        print_json({kind.collection: rows})
    else:
        _print_rows(kind, rows)
    return 0


def run_get(arguments: argparse.Namespace) -> int:
    from homefire.cli.server import Server

    kind: ResourceKind = arguments.kind
    with Server(home_of(arguments)) as server:
        print_json(server.get(_resource(server, kind, arguments.name)))
    return 0


def run_delete(arguments: argparse.Namespace) -> int:
    from homefire.cli.server import Server
    from homefire.wire.errors import Unsupported

    kind: ResourceKind = arguments.kind
    if not kind.delete_warning:
        raise Unsupported(f"a {kind.noun} cannot be deleted: {kind.no_delete}")
    question = f"delete {kind.noun} {arguments.name}? {kind.delete_warning}"
    if not (arguments.yes or confirmed(question)):
        return 1
    with Server(home_of(arguments)) as server:
        server.delete(_resource(server, kind, arguments.name))
    if arguments.json:
        print_json({"deleted": arguments.name})
    else:
        print(f"{kind.noun} {arguments.name} deleted")
    return 0


def _resource(server: Server, kind: ResourceKind, name: str) -> str:
    if name.startswith("accounts/"):
        return f"/v1/{name}"
    return f"/v1/{server.account()}/{kind.collection}/{name}"


def _print_rows(kind: ResourceKind, rows: list[Row]) -> None:
    titles = [column.title for column in kind.columns]
    cells = [[_text(column.cell(row)) for column in kind.columns] for row in rows]
    print_table(f"{kind.noun}s", titles, cells)


def _text(value: Any) -> str:
    return "-" if value is None else str(value)
