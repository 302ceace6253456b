"""`homefire checkpoint list|get|delete|promote --job J`: what a job saved, and what became of it."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from homefire.cli import checkpoint_files, checkpoint_import, checkpoint_retention
from homefire.cli.confirmation import confirmed
from homefire.cli.options import Commands, add_home, add_json, home_of
from homefire.cli.tables import last_segment, print_json, print_table, short_digest, size

if TYPE_CHECKING:
    from homefire.cli.server import Server
    from homefire.wire.errors import InternalError
    from homefire.wire.records import Lineage, LineageNode
    from homefire.wire.resources import CheckpointRow, Operation

_COLUMNS = (
    "checkpoint",
    "kind",
    "step",
    "parent",
    "size",
    "digest",
    "promotable",
    "hot loads",
    "evaluations",
)


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "checkpoint",
        help="list, import, promote, export, compare, verify, pin or prune the checkpoints of a trainer job",
    )
    verbs = parser.add_subparsers(
        dest="verb",
        metavar="list|get|delete|promote|import|pin|unpin|prune|retention|export|diff|verify",
        required=True,
    )
    for verb, run in (("list", run_list), ("get", run_get), ("delete", run_delete)):
        leaf = verbs.add_parser(verb, help=f"{verb} checkpoint{'s' if verb == 'list' else ''}")
        if verb != "list":
            leaf.add_argument(
                "name", metavar="NAME", help="a snapshot's identity or a state's name"
            )
        if verb == "delete":
            leaf.add_argument("--yes", action="store_true", help="do not ask")
        leaf.add_argument("--job", metavar="J", required=True, help="id of the trainer job")
        add_home(leaf)
        add_json(leaf)
        leaf.set_defaults(run=run)
    _add_promote(verbs)
    checkpoint_import.add_verb(verbs)
    checkpoint_retention.add_verbs(verbs)
    checkpoint_files.add_verbs(verbs)


def _add_promote(verbs: Commands) -> None:
    leaf = verbs.add_parser("promote", help="make a model of a snapshot, to serve or to train on")
    leaf.add_argument("name", metavar="NAME", help="a snapshot's identity: base, delta or LoRA")
    leaf.add_argument("--as", dest="model", metavar="MODEL", required=True, help="the model's id")
    leaf.add_argument("--job", metavar="J", required=True, help="id of the trainer job")
    add_home(leaf)
    add_json(leaf)
    leaf.set_defaults(run=run_promote)


def run_list(arguments: argparse.Namespace) -> int:
    import msgspec

    from homefire.cli.server import Server
    from homefire.wire.records import Lineage
    from homefire.wire.resources import CheckpointRow

    with Server(home_of(arguments)) as server:
        rows = _rows(server, arguments.job)
        lineage = server.get(f"{_job(server, arguments.job)}/lineage")
    if arguments.json:
        print_json({"checkpoints": rows, "lineage": lineage})
    else:
        known = msgspec.convert(lineage, Lineage)
        cells = [_cells(msgspec.convert(row, CheckpointRow), known) for row in rows]
        print_table(f"checkpoints of {arguments.job}", _COLUMNS, cells)
    return 0


def run_get(arguments: argparse.Namespace) -> int:
    from homefire.cli.server import Server
    from homefire.wire.errors import NotFound

    with Server(home_of(arguments)) as server:
        rows = _rows(server, arguments.job)
    for row in rows:
        if arguments.name in {row["name"], last_segment(row["name"])}:
            print_json(row)
            return 0
    names = ", ".join(last_segment(row["name"]) for row in rows) or "none"
    raise NotFound(
        f"job {arguments.job} has no checkpoint {arguments.name!r}", hint=f"it has: {names}"
    )


def run_delete(arguments: argparse.Namespace) -> int:
    from homefire.cli.server import Server

    name = last_segment(arguments.name)
    question = f"delete checkpoint {name} of {arguments.job}? its files are removed"
    if not (arguments.yes or confirmed(question)):
        return 1
    with Server(home_of(arguments)) as server:
        server.delete(f"{_job(server, arguments.job)}/checkpoints/{name}")
    if arguments.json:
        print_json({"deleted": name})
    else:
        print(f"checkpoint {name} deleted")
    return 0


def run_promote(arguments: argparse.Namespace) -> int:
    """Waits for the model to be there; interrupted, the promotion goes on."""
    import msgspec

    from homefire.cli.server import Server
    from homefire.wire.resources import Operation, PromoteAnswer

    with Server(home_of(arguments)) as server:
        account = server.account()
        path = f"/v1/{account}/checkpoints/{last_segment(arguments.name)}:promote"
        body = {
            "output_model": arguments.model,
            "trainer_job_id": last_segment(arguments.job),
            "async_promotion": True,
        }
        operation = msgspec.convert(server.post(path, body), PromoteAnswer).operation
        while operation is not None and not operation.done:
            if not arguments.json:
                print(
                    f"promoting {last_segment(arguments.name)} …{_progress(operation)}", flush=True
                )
            operation = server.get_as(Operation, f"/v1/{operation.name}")
    if operation is None or operation.response is None:
        raise _promotion_error(operation)
    if arguments.json:
        print_json(msgspec.to_builtins(operation.response))
    else:
        print(f"{operation.response.name} is there")
    return 0


def _progress(operation: Operation) -> str:
    """` reading the chain 3/7`."""
    progress = operation.metadata.get("progress")
    return "" if progress is None else " {stage} {done}/{total}".format_map(progress)


def _promotion_error(operation: Operation | None) -> InternalError:
    from homefire.wire.errors import InternalError

    status = None if operation is None else operation.error
    message = "the server gave no reason" if status is None else status.message
    return InternalError(f"the promotion failed: {message}", hint="see `homefire logs`")


def _job(server: Server, job: str) -> str:
    name = job if job.startswith("accounts/") else f"{server.account()}/rlorTrainerJobs/{job}"
    return f"/v1/{name}"


def _rows(server: Server, job: str) -> list[dict[str, Any]]:
    return server.list_all(f"{_job(server, job)}/checkpoints", "checkpoints")


def _cells(row: CheckpointRow, lineage: Lineage) -> list[str]:
    name = last_segment(row.name)
    return [
        name,
        row.kind,
        str(row.step),
        row.parent or "-",
        size(row.size_bytes),
        short_digest(row.digest),
        "yes" if row.promotable else "no",
        _joined(_hot_load(node) for node in _reached(lineage, name, "loaded")),
        _joined(_evaluation(node) for node in _reached(lineage, name, "evaluated")),
    ]


def _reached(lineage: Lineage, identity: str, edge_kind: str) -> list[LineageNode]:
    """Nodes that an edge of this kind leads to from the snapshot."""
    source = f"snapshot:{identity}"
    targets = {
        edge.target for edge in lineage.edges if edge.source == source and edge.kind == edge_kind
    }
    return [node for node in lineage.nodes if node.id in targets]


def _joined(texts: Iterable[str]) -> str:
    """Each text once: a deployment that restarted loaded the same snapshot again."""
    return ", ".join(dict.fromkeys(texts)) or "-"


def _hot_load(node: LineageNode) -> str:
    deployment = str(node.attributes.get("deployment", "?"))
    return deployment if node.attributes.get("ok", True) else f"{deployment} (failed)"


def _evaluation(node: LineageNode) -> str:
    scores = ", ".join(f"{k} {v:.3f}" for k, v in node.attributes.get("scores", {}).items())
    return f"{node.attributes.get('name', '?')}: {scores}"
