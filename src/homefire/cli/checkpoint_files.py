"""`homefire checkpoint verify|diff|export --job J`: a job's checkpoints as files.

They read the store of the home, a directory or an object store, whether or not homefire is up.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from homefire.cli.options import Commands, add_home, add_json, home_of
from homefire.cli.progress_line import progress_line
from homefire.cli.tables import last_segment, print_json, print_table, short_digest, size

if TYPE_CHECKING:
    from homefire.checkpoints import CheckpointStore
    from homefire.checkpoints.difference import TensorDifference
    from homefire.wire.errors import InvalidArgument
    from homefire.wire.manifest import CheckpointFamily, Manifest

_LOCAL = "local"


def add_verbs(verbs: Commands) -> None:
    verify = _add(verbs, "verify", "read checkpoints again and check every digest", needs_job=False)
    verify.add_argument("--model", metavar="M", help="an imported model, in place of a job")
    verify.add_argument("name", metavar="NAME", nargs="?", help="one of them; default: all")
    verify.set_defaults(run=run_verify)

    diff = _add(verbs, "diff", "what differs between two snapshots, tensor by tensor")
    diff.add_argument("before", metavar="BEFORE", help="a snapshot's identity")
    diff.add_argument("after", metavar="AFTER", help="another's")
    diff.set_defaults(run=run_diff)

    export = _add(verbs, "export", "write a snapshot as a Hugging Face or PEFT directory")
    export.add_argument("name", metavar="NAME", help="a snapshot's identity: base, delta or LoRA")
    export.add_argument("--to", type=Path, metavar="DIR", required=True, help="made by the export")
    export.set_defaults(run=run_export)


def _add(
    verbs: Commands, verb: str, summary: str, *, needs_job: bool = True
) -> argparse.ArgumentParser:
    leaf = verbs.add_parser(verb, help=summary)
    leaf.add_argument("--job", metavar="J", required=needs_job, help="id of the trainer job")
    leaf.add_argument("--slot", metavar="S", help="where a name is in several slots of the job")
    add_home(leaf)
    add_json(leaf)
    return leaf


def run_verify(arguments: argparse.Namespace) -> int:
    """1 when anything is damaged."""
    if (arguments.job is None) == (arguments.model is None):
        raise _one_of_both()
    if arguments.model is not None:
        return _verify_model(arguments)
    return _verify_job(arguments)


def _verify_model(arguments: argparse.Namespace) -> int:
    from homefire.checkpoints.model_import import verify_import
    from homefire.wire.ids import check_name

    name = check_name(last_segment(arguments.model), field="model")
    manifest = verify_import(home_of(arguments).models / name)
    if arguments.json:
        print_json({"model": name, "digest": manifest.digest, "ok": True})
    else:
        print(f"ok       {name}  {manifest.base_model}  {short_digest(manifest.digest)}")
    return 0


def _one_of_both() -> InvalidArgument:
    from homefire.wire.errors import InvalidArgument

    return InvalidArgument(
        "what to verify is not clear",
        hint="give --job for a job's checkpoints, or --model for an imported model",
        field="job",
    )


def _verify_job(arguments: argparse.Namespace) -> int:
    from homefire.checkpoints.verification import verify
    from homefire.wire.errors import ErrorRecord

    store = _store(arguments)
    asked = [_find(store, arguments, arguments.name)] if arguments.name else None
    num_damaged = 0
    verdicts: list[dict[str, object]] = []
    for verdict in verify(store, asked or _all(store, arguments)):
        manifest, error = verdict.manifest, verdict.error
        num_damaged += error is not None
        verdicts.append(
            {
                "checkpoint": manifest.identity,
                "slot": manifest.slot,
                "kind": manifest.kind,
                "digest": manifest.digest,
                "ok": error is None,
                "error": None if error is None else ErrorRecord.of(error).message,
            }
        )
        if not arguments.json:
            good = f"ok       {manifest.identity}  {manifest.kind}  {short_digest(manifest.digest)}"
            print(good if error is None else f"DAMAGED  {manifest.identity}  {error}", flush=True)
    if arguments.json:
        print_json({"checkpoints": verdicts})
    else:
        print(f"{len(verdicts) - num_damaged} of {len(verdicts)} checkpoints are whole")
    return 1 if num_damaged else 0


def run_diff(arguments: argparse.Namespace) -> int:
    from homefire.checkpoints import materialize
    from homefire.checkpoints.difference import compare

    store = _store(arguments)
    found = [
        materialize(store, m.account, m.job, m.slot, m.identity)
        for m in (
            _find(store, arguments, name, family=_sampler())
            for name in (arguments.before, arguments.after)
        )
    ]
    rows = compare(found[0].tensors, found[1].tensors)
    if arguments.json:
        print_json({"tensors": [_row_fields(row) for row in rows]})
        return 0
    changed = sorted((row for row in rows if row.num_changed), key=_share, reverse=True)
    title = f"tensors of {arguments.after} that differ from {arguments.before}"
    columns = ("tensor", "elements", "changed", "share", "largest change")
    print_table(title, columns, [_cells(row) for row in changed])
    total, moved = (sum(getattr(row, f) for row in rows) for f in ("num_elements", "num_changed"))
    print(f"{moved} of {total} elements differ ({moved / max(total, 1):.2%})")
    return 0


def run_export(arguments: argparse.Namespace) -> int:
    from homefire.checkpoints.export import export

    store = _store(arguments)
    manifest = _find(store, arguments, arguments.name, family=_sampler())
    destination: Path = arguments.to.expanduser().absolute()
    report = progress_line(quiet=arguments.json)
    size_bytes = export(store, manifest, destination, report=report)
    if arguments.json:
        fields = {"checkpoint": manifest.identity, "kind": manifest.kind, "digest": manifest.digest}
        print_json({**fields, "directory": str(destination), "size_bytes": size_bytes})
    else:
        kind = "PEFT" if manifest.lora is not None else "Hugging Face"
        digest = short_digest(manifest.digest)
        print(f"{destination}: a {kind} directory of {size(size_bytes)}, digest {digest} checked")
    return 0


def _store(arguments: argparse.Namespace) -> CheckpointStore:
    from homefire.checkpoints import open_store

    return open_store(home_of(arguments).store_root)


def _sampler() -> CheckpointFamily:
    from homefire.wire.manifest import CheckpointFamily

    return CheckpointFamily.SAMPLER


def _all(
    store: CheckpointStore, arguments: argparse.Namespace, family: CheckpointFamily | None = None
) -> list[Manifest]:
    """In the order of their making. NotFound, naming jobs that exist, when the job saved nothing."""
    from homefire.wire.errors import NotFound

    account, job = _job(arguments.job)
    found = store.list(account, job, slot=arguments.slot, family=family)
    if not found:
        jobs = ", ".join(store.jobs(account)) or "none"
        where = f" in slot {arguments.slot!r}" if arguments.slot else ""
        raise NotFound(
            f"job {job} saved no checkpoint{where}", hint=f"jobs with checkpoints: {jobs}"
        )
    return sorted(found, key=lambda manifest: manifest.slot)


def _find(
    store: CheckpointStore,
    arguments: argparse.Namespace,
    name: str,
    *,
    family: CheckpointFamily | None = None,
) -> Manifest:
    from homefire.wire.errors import InvalidArgument, NotFound

    every = _all(store, arguments, family)
    found = [manifest for manifest in every if manifest.identity == last_segment(name)]
    if not found:
        names = ", ".join(manifest.identity for manifest in every[-10:])
        raise NotFound(
            f"job {arguments.job} has no checkpoint {name!r}", hint=f"its latest are: {names}"
        )
    if len({manifest.slot for manifest in found}) > 1:
        slots = ", ".join(sorted(manifest.slot for manifest in found))
        raise InvalidArgument(
            f"checkpoint {name!r} is in several slots: {slots}",
            hint="choose one with --slot",
            field="slot",
        )
    return found[0]


def _job(name: str) -> tuple[str, str]:
    """`accounts/a/rlorTrainerJobs/j` or `j` -> account and job."""
    parts = name.split("/")
    return (parts[1], parts[-1]) if parts[0] == "accounts" and len(parts) == 4 else (_LOCAL, name)


def _share(row: TensorDifference) -> float:
    return row.num_changed / max(row.num_elements, 1)


def _cells(row: TensorDifference) -> list[str]:
    largest = "-" if row.largest is None else f"{row.largest:.3g}"
    return [row.name, str(row.num_elements), str(row.num_changed), f"{_share(row):.2%}", largest]


def _row_fields(row: TensorDifference) -> dict[str, object]:
    import math

    finite = row.largest is not None and math.isfinite(row.largest)
    return {
        "name": row.name,
        "num_elements": row.num_elements,
        "num_changed": row.num_changed,
        "largest": row.largest if finite else None,
    }
