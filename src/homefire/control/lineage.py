"""The lineage of a job: base model -> steps -> snapshots -> hot loads and evaluations. Pure.

model:tiny -trained-> step:1 -trained-> step:2 -saved-> snapshot:step_00002-4b50536f
snapshot:step_00002-4b50536f -loaded-> hot_load:serving/1800000012.5 ; -evaluated-> evaluation:…
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from homefire.control.db.rows import JobRow, ModelRow
from homefire.control.job_records import Event, integer, number, time_of
from homefire.wire.ids import model_name
from homefire.wire.manifest import CheckpointKind, Manifest
from homefire.wire.records import EdgeKind, Evaluation, Lineage, LineageEdge, LineageNode, NodeKind


def lineage_of(
    job: JobRow,
    *,
    events: Iterable[Event],
    checkpoints: Sequence[Manifest],
    replica_events: Iterable[tuple[str, Event]],
    evaluations: Iterable[Evaluation],
    models: Iterable[ModelRow],
) -> Lineage:
    """The graph of one job. `replica_events` may be of any deployment: what is not of this job's
    snapshots, by identity and digest, is left out."""
    graph = _Graph()
    root = graph.node(NodeKind.MODEL, job.config.base_model.name, at=job.created_at)
    steps = _add_steps(graph, root, events)
    snapshots = _add_checkpoints(graph, root, steps, checkpoints)
    _add_hot_loads(graph, snapshots, replica_events)
    _add_evaluations(graph, job, snapshots, evaluations)
    for model in models:
        if model.source.job == job.id and model.source.checkpoint in snapshots:
            name = model_name(model.account, model.id)
            node = graph.node(NodeKind.PROMOTED, name, at=model.created_at)
            graph.edge(_id(NodeKind.SNAPSHOT, model.source.checkpoint), node, EdgeKind.PROMOTED)
    return Lineage(job.id, list(graph.nodes.values()), graph.edges)


class _Graph:
    def __init__(self) -> None:
        self.nodes: dict[str, LineageNode] = {}
        self.edges: list[LineageEdge] = []

    def node(
        self, kind: NodeKind, name: str, /, *, at: float | None = None, **attributes: object
    ) -> str:
        identifier = _id(kind, name)
        known = {key: value for key, value in attributes.items() if value is not None}
        self.nodes.setdefault(identifier, LineageNode(identifier, kind, at, known))
        return identifier

    def edge(self, source: str, target: str, kind: EdgeKind) -> None:
        self.edges.append(LineageEdge(source, target, kind))


def _id(kind: NodeKind, name: str) -> str:
    return f"{kind}:{name}"


def _add_steps(graph: _Graph, root: str, events: Iterable[Event]) -> set[int]:
    """A step that was replayed or branched from is one node; its first record counts."""
    previous, steps = root, set[int]()
    for event in events:
        if event.get("event") == "state_loaded":
            previous = _add_loaded_state(graph, event) or previous
        step = integer(event.get("step"))
        if event.get("event") != "optim_step" or step is None or step in steps:
            continue
        node = graph.node(
            NodeKind.STEP, str(step), at=time_of(event), loss=number(event.get("loss"))
        )
        is_loaded = previous.startswith(f"{NodeKind.STATE}:")
        graph.edge(previous, node, EdgeKind.LOADED if is_loaded else EdgeKind.TRAINED)
        steps.add(step)
        previous = node
    return steps


def _add_loaded_state(graph: _Graph, event: Event) -> str | None:
    name = event.get("name") or event.get("path")
    return graph.node(NodeKind.STATE, str(name), at=time_of(event)) if name else None


def _add_checkpoints(
    graph: _Graph, root: str, steps: set[int], checkpoints: Sequence[Manifest]
) -> dict[str, Manifest]:
    """Returns the sampler snapshots by identity."""
    snapshots = {m.identity: m for m in checkpoints if m.kind is not CheckpointKind.STATE}
    for manifest in checkpoints:
        is_state = manifest.kind is CheckpointKind.STATE
        node = graph.node(
            NodeKind.STATE if is_state else NodeKind.SNAPSHOT,
            manifest.identity,
            at=manifest.created_at,
            kind=manifest.kind.value,
            step=manifest.step,
            digest=manifest.digest,
            size_bytes=manifest.size_bytes,
        )
        source = _id(NodeKind.STEP, str(manifest.step)) if manifest.step in steps else root
        graph.edge(source, node, EdgeKind.SAVED)
        if manifest.parent in snapshots and not is_state:
            graph.edge(_id(NodeKind.SNAPSHOT, manifest.parent), node, EdgeKind.PARENT)
    return snapshots


def _add_hot_loads(
    graph: _Graph, snapshots: dict[str, Manifest], events: Iterable[tuple[str, Event]]
) -> None:
    for deployment, event in events:
        manifest = snapshots.get(str(event.get("identity")))
        if event.get("event") != "hot_load" or manifest is None:
            continue
        if not _agrees(str(event.get("digest") or ""), manifest):
            continue
        node = graph.node(
            NodeKind.HOT_LOAD,
            f"{deployment}/{time_of(event)}",
            at=time_of(event),
            deployment=deployment,
            ok=event.get("ok"),
            load_ms=event.get("load_ms"),
            drain_ms=event.get("drain_ms"),
            error=event.get("error") or None,
        )
        graph.edge(_id(NodeKind.SNAPSHOT, manifest.identity), node, EdgeKind.LOADED)


def _add_evaluations(
    graph: _Graph, job: JobRow, snapshots: dict[str, Manifest], evaluations: Iterable[Evaluation]
) -> None:
    for evaluation in evaluations:
        of_this_job = evaluation.job.rpartition("/")[2] == job.id
        manifest = snapshots.get(evaluation.identity)
        same = manifest is not None and _agrees(evaluation.digest, manifest)
        if not (of_this_job or same):
            continue
        node = graph.node(
            NodeKind.EVALUATION,
            evaluation.id,
            at=evaluation.at,
            name=evaluation.name,
            scores=evaluation.scores,
            identity=evaluation.identity,
        )
        if manifest is not None and same:
            graph.edge(_id(NodeKind.SNAPSHOT, evaluation.identity), node, EdgeKind.EVALUATED)


def _agrees(digest: str, manifest: Manifest) -> bool:
    """Clients may give a digest short, as some headers do, or not at all."""
    return manifest.digest.startswith(digest)
