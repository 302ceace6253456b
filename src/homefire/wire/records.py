"""Records of a run: metrics, evaluations, and the lineage that ties weights to what they did."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from enum import StrEnum
from typing import Any

import msgspec


class MetricsEntry(msgspec.Struct, frozen=True, kw_only=True):
    """What a client adds to a job's record.

    Example: MetricsEntry(step=12, metrics={"reward": 0.71}).
    """

    step: int
    metrics: dict[str, float]


class MetricsRow(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One row of a job's record, written by the trainer or by a client (`event` is `client`)."""

    at: float
    """Unix time in seconds."""
    step: int
    """Optimizer steps applied when the row was written."""
    event: str
    loss: float | None = None
    tokens: int | None = None
    ms: float | None = None
    metrics: dict[str, Any] = {}


class MetricsRecord(msgspec.Struct, frozen=True):
    rows: list[MetricsRow]
    """Oldest first."""


class EvaluationEntry(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """An evaluation as a client reports it: which weights, on which prompts, how, with what result."""

    name: str
    """What was evaluated, e.g. `held-out`."""
    deployment: str
    identity: str
    """The weights that made the completions; `base` before any snapshot."""
    digest: str = ""
    step: int = 0
    prompts_sha256: str = ""
    num_prompts: int = 0
    sampling: dict[str, Any] = {}
    scores: dict[str, float] = {}
    job: str = ""
    """Id or resource name of the trainer job that made the weights."""
    prompt_tokens: list[list[int]] = []
    """The prompts themselves, kept once per set and left out of listings: what a rerun needs."""
    prompt_tokens_sha256: str = ""
    """Names the kept set; control computes it."""
    completions_sha256: str = ""
    """`token_lists_sha256` of the completions' tokens, in the order of the prompts."""
    scorer: str = ""
    """What made the scores, as `package.module:function`; see `homefire eval rerun`."""


class PromptSet(msgspec.Struct, frozen=True, rename="camel"):
    sha256: str
    prompt_tokens: list[list[int]]


def token_lists_sha256(lists: Sequence[Sequence[int]]) -> str:
    """SHA-256, hex, of the lists as compact JSON: `[[72,105],[72,111]]`."""
    return hashlib.sha256(msgspec.json.encode([list(tokens) for tokens in lists])).hexdigest()


class Evaluation(EvaluationEntry, frozen=True, rename="camel", kw_only=True):
    id: str
    at: float
    """Unix time in seconds."""


class EvaluationList(msgspec.Struct, frozen=True):
    evaluations: list[Evaluation]


class NodeKind(StrEnum):
    """What a node of a job's lineage is."""

    MODEL = "model"
    """The base model that the job started from."""
    STEP = "step"
    """An optimizer step."""
    SNAPSHOT = "snapshot"
    """A sampler snapshot in the store."""
    STATE = "state"
    """A train state in the store."""
    HOT_LOAD = "hot_load"
    """A replica took, or failed to take, a snapshot."""
    EVALUATION = "evaluation"
    """Scores of one set of weights."""
    PROMOTED = "promoted"
    """A model resource made from a snapshot; in an account's graph it is a `model`."""
    JOB = "job"
    """A trainer job; in an account's graph only, as is the next."""
    DEPLOYMENT = "deployment"
    """A deployment."""


class LineageNode(msgspec.Struct, frozen=True, omit_defaults=True):
    id: str
    """Unique in its graph, e.g. `snapshot:step_00010-4b50536f`."""
    kind: NodeKind
    at: float | None = None
    attributes: dict[str, Any] = {}


class EdgeKind(StrEnum):
    """How one node came from another."""

    TRAINED = "trained"
    """model -> first step, step -> next step."""
    SAVED = "saved"
    """step -> snapshot or state."""
    PARENT = "parent"
    """snapshot -> the delta that applies to it."""
    LOADED = "loaded"
    """snapshot -> hot load; state -> the step that training went on from."""
    EVALUATED = "evaluated"
    """snapshot -> evaluation."""
    PROMOTED = "promoted"
    """snapshot -> model."""
    STARTED = "started"
    """model -> job."""
    SERVED = "served"
    """model -> the deployments of it; snapshot -> the deployment that serves it."""


class Direction(StrEnum):
    """Which way a lineage is followed from a node."""

    UP = "up"
    """What it was made of."""
    DOWN = "down"
    """What was made of it."""
    BOTH = "both"


class LineageQuestion(msgspec.Struct, frozen=True, kw_only=True):
    """Where in an account's lineage to begin; without anything, all of it.

    Example: LineageQuestion(job="job-3f9a1c2e", step=40, direction=Direction.DOWN).
    """

    weights: str = ""
    """As completions name them: `step_00040-4b50536f; sha=9f86d081884c7d65`."""
    job: str = ""
    step: int | None = None
    """Of `job`."""
    model: str = ""
    node: str = ""
    direction: Direction = Direction.BOTH


class LineageEdge(msgspec.Struct, frozen=True):
    source: str
    target: str
    kind: EdgeKind


class Lineage(msgspec.Struct, frozen=True):
    job: str
    nodes: list[LineageNode]
    edges: list[LineageEdge]


class CapacityReport(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    threads_total: int
    threads_used: int
    memory_total_bytes: int
    memory_used_bytes: int
    waiting: list[str] = []
    """Names of jobs and deployments that wait for room."""


class ReplicaReport(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    replica: int
    pid: int | None
    ready: bool
    identity: str | None
    digest: str
    stage: str
    canary: str = ""
    """What the canary said of what it serves; empty before it answers."""
    error: str = ""
    running: int = 0
    queued: int = 0
    restarts: int = 0


class DeploymentReport(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    name: str
    state: str
    message: str
    base_model: str
    desired_identity: str | None
    replicas: list[ReplicaReport]


class JobReport(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    name: str
    state: str
    message: str
    base_model: str
    mode: str
    pid: int | None
    step: int
    num_accepted: int = 0
    num_applied: int = 0
    num_unsaved: int = 0
    """Operations since the newest recovery point: what a death now would replay."""
    engine_restarts: int = 0
    restarts: int = 0
    ranks: int = 1
    """Processes of the engine."""
    detail: str = ""
    held_graph_bytes: int = 0
    """Kept between the two calls of custom losses."""
    held_graph_budget_bytes: int = 0
    num_graphs_reused: int = 0
    num_graphs_recomputed: int = 0


class RunReport(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """A training run of the root plane whose session is not over."""

    run: str
    session_name: str | None
    """Display name of its session."""
    job: str
    base_model: str
    lora_rank: int
    """0: all parameters train."""
    silent_s: float
    """Since its client was last heard of."""


class StatusReport(msgspec.Struct, frozen=True, rename="camel", kw_only=True):
    """Answer of `GET /v1/homefire/status`."""

    version: str
    home: str
    url: str
    jobs: list[JobReport]
    deployments: list[DeploymentReport]
    capacity: CapacityReport
    runs: list[RunReport] = []
    """Newest first; of clients that were heard of within a day."""


class LogReport(msgspec.Struct, frozen=True):
    name: str
    lines: list[str]
