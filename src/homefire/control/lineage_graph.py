"""One graph of an account: base model -> job -> step -> snapshot -> hot load -> evaluation. Pure.

model:tiny -started-> job:j1 -trained-> step:j1/1 -saved-> snapshot:j1/step_1
snapshot:j1/step_1 -loaded-> hot_load:serving/18… ; -evaluated-> evaluation:evaluation-3f…
snapshot:j1/step_1 -promoted-> model:accounts/local/models/best -started-> job:j2
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import msgspec

from homefire.control.db.rows import DeploymentRow
from homefire.wire.checkpoint_paths import (
    is_checkpoint_path,
    parse_checkpoint_path,
    parse_cross_job_path,
)
from homefire.wire.errors import InvalidArgument, NotFound
from homefire.wire.ids import POLICY_SLOT, job_of_model
from homefire.wire.records import (
    Direction,
    EdgeKind,
    Lineage,
    LineageEdge,
    LineageNode,
    LineageQuestion,
    NodeKind,
)

_OF_A_JOB = frozenset({NodeKind.STEP, NodeKind.SNAPSHOT, NodeKind.STATE})
"""Kinds whose names are unique in their job only."""


def account_graph(jobs: Iterable[Lineage], deployments: Iterable[DeploymentRow]) -> Lineage:
    """The lineages of the account's jobs as one graph, in which names are unique."""
    nodes: dict[str, LineageNode] = {}
    edges: dict[LineageEdge, None] = {}
    for lineage in jobs:
        job = _node(NodeKind.JOB, lineage.job)
        nodes[job.id] = job
        renamed = {node.id: _renamed(node, lineage.job) for node in lineage.nodes}
        for node in renamed.values():
            nodes.setdefault(node.id, node)
        for edge in lineage.edges:
            source, target = renamed[edge.source], renamed[edge.target]
            if source.kind is NodeKind.MODEL and edge.kind is not EdgeKind.PROMOTED:
                edges[LineageEdge(source.id, job.id, EdgeKind.STARTED)] = None
                source = job
            edges[LineageEdge(source.id, target.id, edge.kind)] = None
        if (model := _base_model(lineage)) is not None:
            edges[LineageEdge(model, job.id, EdgeKind.STARTED)] = None
    for deployment in deployments:
        _add_deployment(nodes, edges, deployment)
    return Lineage("", list(nodes.values()), list(edges))


def answer(graph: Lineage, question: LineageQuestion) -> Lineage:
    """The part of the graph that the question is about. NotFound says what there is."""
    starts = _starts(graph, question)
    if starts is None:
        return graph
    reached = set(starts)
    if question.direction is not Direction.DOWN:
        reached |= _reach(graph, starts, lambda edge: (edge.target, edge.source))
    if question.direction is not Direction.UP:
        reached |= _reach(graph, starts, lambda edge: (edge.source, edge.target))
    return Lineage(
        graph.job,
        [node for node in graph.nodes if node.id in reached],
        [edge for edge in graph.edges if edge.source in reached and edge.target in reached],
    )


def dot(graph: Lineage) -> str:
    """The graph for Graphviz."""
    lines = ["digraph lineage {", "  rankdir=LR;", "  node [shape=box];"]
    lines += [f"  {_quoted(n.id)} [label={_quoted(_label(n))}];" for n in graph.nodes]
    lines += [
        f"  {_quoted(e.source)} -> {_quoted(e.target)} [label={_quoted(e.kind.value)}];"
        for e in graph.edges
    ]
    return "\n".join([*lines, "}", ""])


def _renamed(node: LineageNode, job: str) -> LineageNode:
    kind, _, name = node.id.partition(":")
    if node.kind is NodeKind.PROMOTED:
        return msgspec.structs.replace(node, id=f"{NodeKind.MODEL}:{name}", kind=NodeKind.MODEL)
    if node.kind is NodeKind.STATE:
        return msgspec.structs.replace(node, id=f"{kind}:{_state_name(name, job)}")
    return (
        msgspec.structs.replace(node, id=f"{kind}:{job}/{name}") if node.kind in _OF_A_JOB else node
    )


def _state_name(name: str, job: str) -> str:
    """`cross_job://other/mark` is `other/mark`, so that a branch hangs on what it branched from."""
    try:
        if (other := parse_cross_job_path(name)) is not None:
            return f"{other.job}/{other.name}"
        if is_checkpoint_path(name):
            path = parse_checkpoint_path(name)
            return f"{job_of_model(path.run) or job}/{path.name}"
    except InvalidArgument:
        pass
    return f"{job}/{name}"


def _base_model(lineage: Lineage) -> str | None:
    return next((node.id for node in lineage.nodes if node.kind is NodeKind.MODEL), None)


def _add_deployment(
    nodes: dict[str, LineageNode], edges: dict[LineageEdge, None], row: DeploymentRow
) -> None:
    model = _node(NodeKind.MODEL, row.config.base_model.name)
    deployment = _node(NodeKind.DEPLOYMENT, row.id, state=row.state.value)
    nodes.setdefault(model.id, model)
    nodes[deployment.id] = deployment
    edges[LineageEdge(model.id, deployment.id, EdgeKind.SERVED)] = None
    where = row.desired.location
    if where is not None and row.desired.identity is not None and where.slot == POLICY_SLOT:
        snapshot = f"{NodeKind.SNAPSHOT}:{where.job}/{row.desired.identity}"
        if snapshot in nodes:
            edges[LineageEdge(snapshot, deployment.id, EdgeKind.SERVED)] = None


def _starts(graph: Lineage, question: LineageQuestion) -> list[str] | None:
    """The nodes that the question names; None when it names nothing."""
    known = {node.id for node in graph.nodes}
    if question.weights:
        return _made_by(graph, question.weights)
    if question.step is not None:
        if not question.job:
            raise InvalidArgument("a step is of a job", hint="name the job too", field="job")
        wanted = f"{NodeKind.STEP}:{question.job}/{question.step}"
        steps = [n.id for n in graph.nodes if n.attributes.get("step") == question.step
                 and n.id.partition(":")[2].startswith(f"{question.job}/")]  # fmt: skip
        return _existing([wanted, *steps], known, f"step {question.step} of job {question.job}")
    if question.job:
        return _existing([f"{NodeKind.JOB}:{question.job}"], known, f"job {question.job}")
    if question.model:
        full = [m for m in known if m.startswith("model:") and m.endswith(f"/{question.model}")]
        return _existing([f"model:{question.model}", *full], known, f"model {question.model}")
    if question.node:
        return _existing([question.node], known, f"node {question.node}")
    return None


def _made_by(graph: Lineage, weights: str) -> list[str]:
    """`step_1; sha=9f86…`, `accounts/a/models/m@step_1`, `step_1`, or the digest alone."""
    identity, _, digest = weights.partition("; sha=")
    identity = identity.rpartition("@")[2].strip()
    found = [
        node.id
        for node in graph.nodes
        if node.kind is NodeKind.SNAPSHOT
        and (
            (node.id.rpartition("/")[2] == identity and _begins(node, digest.strip()))
            or (len(identity) >= 8 and not digest and _begins(node, identity))
        )
    ]
    if not found:
        raise NotFound(
            f"no snapshot in the store is {weights!r}",
            hint="give the header x-homefire-weights, a completion's `model`, an identity or a digest;"
            " `base` is the base model itself",
        )
    return found


def _begins(node: LineageNode, digest: str) -> bool:
    return str(node.attributes.get("digest", "")).startswith(digest)


def _existing(wanted: Sequence[str], known: set[str], what: str) -> list[str]:
    found = [name for name in dict.fromkeys(wanted) if name in known]
    if not found:
        raise NotFound(
            f"the lineage has no {what}", hint="`homefire lineage` without options shows all of it"
        )
    return found


def _reach(
    graph: Lineage, starts: Iterable[str], ends: Callable[[LineageEdge], tuple[str, str]]
) -> set[str]:
    following: dict[str, list[str]] = {}
    for edge in graph.edges:
        source, target = ends(edge)
        following.setdefault(source, []).append(target)
    reached, waiting = set[str](), list(starts)
    while waiting:
        for node in following.get(waiting.pop(), ()):
            if node not in reached:
                reached.add(node)
                waiting.append(node)
    return reached


def _node(kind: NodeKind, name: str, **attributes: object) -> LineageNode:
    return LineageNode(f"{kind}:{name}", kind, None, attributes)


def _label(node: LineageNode) -> str:
    kind, _, name = node.id.partition(":")
    lines = [f"{kind} {name}"]
    if digest := node.attributes.get("digest"):
        lines.append(str(digest)[:12])
    scores: dict[str, float] = node.attributes.get("scores") or {}
    lines += [f"{key} {value:.4g}" for key, value in scores.items()]
    return "\n".join(lines)


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
