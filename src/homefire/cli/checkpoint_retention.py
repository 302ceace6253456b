"""`homefire checkpoint pin|unpin|prune|retention --job J`: which checkpoints stay, and why."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING, Any

from homefire.cli.options import Commands, add_home, add_json, home_of
from homefire.cli.tables import last_segment, print_json, print_table, size

if TYPE_CHECKING:
    from homefire.cli.server import Server
    from homefire.wire.retention import PrunedRow

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_RULES = """\
A checkpoint stays when any rule keeps it. Whatever the rules, these stay too: the newest of each slot,
the parents of deltas that stay, what a deployment serves or a live session samples, what a job would
recover from, what is pinned, and every snapshot that was evaluated (with --keep-best only the best).
"""


def add_verbs(verbs: Commands) -> None:
    for verb, summary in (
        ("pin", "keep a checkpoint whatever its age"),
        ("unpin", "let expiry and retention decide again"),
    ):
        leaf = _add(verbs, verb, summary)
        leaf.add_argument("name", metavar="NAME", help="a snapshot's identity or a state's name")
        leaf.set_defaults(run=run_pin)

    prune = _add(verbs, "prune", "delete the checkpoints that no rule keeps, and say why", _RULES)
    prune.add_argument("--dry-run", action="store_true", help="only show what would go, and why")
    _add_rules(prune, "for this time; default: the job's own policy")
    prune.set_defaults(run=run_prune)

    retention = _add(verbs, "retention", "show or set which checkpoints of a job stay", _RULES)
    _add_rules(retention, "from now on; none of them: show the policy")
    retention.add_argument("--keep-all", action="store_true", help="remove all rules")
    retention.set_defaults(run=run_retention)


def _add(
    verbs: Commands, verb: str, summary: str, epilog: str | None = None
) -> argparse.ArgumentParser:
    leaf = verbs.add_parser(
        verb, help=summary, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    leaf.add_argument("--job", metavar="J", required=True, help="id of the trainer job")
    add_home(leaf)
    add_json(leaf)
    return leaf


def _add_rules(leaf: argparse.ArgumentParser, when: str) -> None:
    rules = leaf.add_argument_group("rules", when)
    rules.add_argument("--keep-last", type=int, metavar="K", help="the newest K of each slot")
    rules.add_argument("--keep-every", type=int, metavar="N", help="steps that are multiples of N")
    rules.add_argument("--ttl", type=duration_s, metavar="TIME", help="the younger, e.g. 12h or 7d")
    rules.add_argument("--keep-best", metavar="SCORE", help="the best evaluated by this score")
    rules.add_argument(
        "--lower-is-better", action="store_true", help="the best is the one with the lowest score"
    )


def run_pin(arguments: argparse.Namespace) -> int:
    from homefire.cli.server import Server

    name = last_segment(arguments.name)
    with Server(home_of(arguments)) as server:
        path = f"{_job(server, arguments.job)}/checkpoints/{name}:{arguments.verb}"
        row = server.post(path, {})
    if arguments.json:
        print_json(row)
    else:
        print(f"checkpoint {name} is {'pinned' if row['pinned'] else 'not pinned'}")
    return 0


def run_prune(arguments: argparse.Namespace) -> int:
    import msgspec

    from homefire.cli.server import Server
    from homefire.wire.retention import PruneReport

    body = {"policy": _policy(arguments), "dryRun": arguments.dry_run}
    with Server(home_of(arguments)) as server:
        answer = server.post(f"{_job(server, arguments.job)}/checkpoints:prune", body)
    if arguments.json:
        print_json(answer)
        return 0
    report = msgspec.convert(answer, PruneReport)
    print_table(
        f"checkpoints of {arguments.job} under {policy_text(answer['policy'])}",
        ("checkpoint", "kind", "step", "size", "stays", "why"),
        [_cells(row) for row in report.checkpoints],
    )
    num_gone = sum(not row.keep for row in report.checkpoints)
    would = "would go" if report.dry_run else "deleted"
    print(f"{num_gone} of {len(report.checkpoints)} {would}, {size(report.freed_bytes)}")
    return 0


def run_retention(arguments: argparse.Namespace) -> int:
    from homefire.cli.server import Server

    asked = {} if arguments.keep_all else _policy(arguments)
    with Server(home_of(arguments)) as server:
        path = f"{_job(server, arguments.job)}/retention"
        policy = server.get(path) if asked is None else server.put(path, asked)
    if arguments.json:
        print_json(policy)
    else:
        print(f"{arguments.job}: {policy_text(policy)}")
    return 0


def duration_s(text: str) -> float:
    """`90s`, `30m`, `12h`, `7d`, `2w`, or plain seconds."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw]?)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no time; write 90s, 30m, 12h, 7d or 2w")
    return float(found[1]) * _UNITS_S[found[2] or "s"]


def policy_text(policy: dict[str, Any]) -> str:
    """`keepLast 5, keepBest reward`."""
    rules = {k: v for k, v in policy.items() if v is not None and v is not False}
    return ", ".join(f"{name} {value}" for name, value in rules.items()) or "no rules: all stay"


def _policy(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """As the body has it; None when no rule was given."""
    rules = {
        "keepLast": arguments.keep_last,
        "keepEvery": arguments.keep_every,
        "ttlSeconds": arguments.ttl,
        "keepBest": arguments.keep_best,
    }
    given = {name: value for name, value in rules.items() if value is not None}
    if arguments.lower_is_better:
        given["lowerIsBetter"] = True
    return given or None


def _job(server: Server, job: str) -> str:
    name = job if job.startswith("accounts/") else f"{server.account()}/rlorTrainerJobs/{job}"
    return f"/v1/{name}"


def _cells(row: PrunedRow) -> list[str]:
    stays = "yes" if row.keep else "no"
    return [
        row.checkpoint,
        row.kind,
        str(row.step),
        size(row.size_bytes),
        stays,
        "; ".join(row.why),
    ]
