"""`homefire lineage`: which weights made this, what was evaluated at a step, what depends on a model."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from homefire.cli.options import Commands, add_home, add_json, home_of
from homefire.cli.tables import last_segment, print_json, short_digest

if TYPE_CHECKING:
    from homefire.wire.records import Lineage, LineageNode

_EPILOG = """\
examples:
  homefire lineage --weights "step_00040-4b50536f; sha=9f86d081884c7d65"   what made a completion
  homefire lineage --job JOB --step 40 --down     what was saved, served and evaluated at step 40
  homefire lineage --model tiny --down            everything that depends on a base model
  homefire lineage --dot | dot -Tsvg > lineage.svg

--weights takes the header x-homefire-weights of a completion, its `model`, an identity or a digest.
"""


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser(
        "lineage",
        help="what weights were made of, and what was made of them",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    start = parser.add_mutually_exclusive_group()
    start.add_argument(
        "--weights", metavar="W", help="begin at the snapshot that these weights are"
    )
    start.add_argument("--model", metavar="M", help="begin at a base or promoted model")
    start.add_argument("--job", metavar="J", help="begin at a trainer job")
    start.add_argument(
        "--node", metavar="N", help="begin at a node, e.g. evaluation:evaluation-3f…"
    )
    parser.add_argument("--step", type=int, metavar="S", help="begin at this step of --job")
    way = parser.add_mutually_exclusive_group()
    way.add_argument(
        "--up", dest="direction", action="store_const", const="up", help="only what it was made of"
    )
    way.add_argument(
        "--down", dest="direction", action="store_const", const="down", help="only what came of it"
    )
    parser.add_argument("--dot", action="store_true", help="print a graph for Graphviz")
    add_home(parser)
    add_json(parser)
    parser.set_defaults(run=run, direction="both")


def run(arguments: argparse.Namespace) -> int:
    import msgspec

    from homefire.cli.server import Server
    from homefire.wire.records import Lineage

    query = {
        "weights": arguments.weights,
        "model": arguments.model,
        "job": arguments.job and last_segment(arguments.job),
        "step": arguments.step,
        "node": arguments.node,
        "direction": arguments.direction,
    }
    given = {name: value for name, value in query.items() if value is not None}
    with Server(home_of(arguments)) as server:
        path = f"/v1/{server.account()}/lineage"
        if arguments.dot:
            print(server.text(path, **given, format="dot"), end="")
            return 0
        answer = server.get(path, **given)
    if arguments.json:
        print_json(answer)
    else:
        for line in tree(msgspec.convert(answer, Lineage)):
            print(line)
    return 0


def tree(graph: Lineage) -> list[str]:
    """The graph as indented lines, from what nothing leads to; steps in a row are one line."""
    nodes = {node.id: node for node in graph.nodes}
    following: dict[str, list[str]] = {}
    for edge in graph.edges:
        if edge.kind != "parent":
            following.setdefault(edge.source, []).append(edge.target)
    led_to = {target for targets in following.values() for target in targets}
    lines: list[str] = []
    seen: set[str] = set()
    waiting = [(node, 0) for node in reversed(graph.nodes) if node.id not in led_to]
    while waiting:
        node, depth = waiting.pop()
        again = node.id in seen
        lines.append(f"{'  ' * depth}{_text(node)}{' (above)' if again else ''}")
        if again:
            continue
        seen.add(node.id)
        for target in reversed(following.get(node.id, [])):
            is_next_step = node.kind == nodes[target].kind == "step"
            waiting.append((nodes[target], depth if is_next_step else depth + 1))
    return lines


def _text(node: LineageNode) -> str:
    kind, _, name = node.id.partition(":")
    attributes = node.attributes
    notes = [str(attributes[key]) for key in ("kind", "state", "name") if attributes.get(key)]
    if attributes.get("digest"):
        notes.append(short_digest(attributes["digest"]))
    if attributes.get("identity"):
        notes.append(f"of {attributes['identity']}")
    if attributes.get("ok") is False:
        notes.append("failed")
    if attributes.get("loss") is not None:
        notes.append(f"loss {attributes['loss']:.4g}")
    notes += [f"{key} {value:.4g}" for key, value in (attributes.get("scores") or {}).items()]
    return f"{kind.replace('_', ' ')} {name}{': ' if notes else ''}{', '.join(notes)}"
