"""Messages between our own services: health, status, hot load, and the gateway's routing table.

All of them travel over the services' own sockets, with the header `x-homefire-secret`.

    GET  /internal/health                                  -> ServiceHealth      (every service)
    GET  /internal/status?after=<version>&wait_s=<s>       -> TrainerStatus      (front)
                                                           -> ReplicaStatus      (replica)
    POST /internal/hot_load        HotLoadRequest          -> ReplicaStatus      (replica; 202)
    POST /internal/forget_loads                            -> {}                 (front)
    GET  /internal/routes?after=<version>&wait_s=<s>       -> RouteTable         (control)
    POST /internal/tinker/runs     NewRun                  -> RunPlace           (control)
    GET  /internal/tinker/runs/{run}?account=<a>           -> RunPlace           (control)
    POST /internal/tinker/samplers SnapshotRef             -> SamplerPlace       (control)
    POST /internal/tinker/wake     Wake                    -> {}                 (control)

`forget_loads` is answered when no recovery would load a state of the store again: control deletes one.
A status with `after` is answered as soon as its version differs from `after`, else after `wait_s`.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from homefire.wire.errors import ErrorRecord
from homefire.wire.ids import POLICY_SLOT
from homefire.wire.specs import Upstream

SECRET_HEADER = "x-homefire-secret"
ACCOUNT_HEADER = "x-homefire-account"
REQUEST_ID_HEADER = "x-request-id"
WEIGHTS_HEADER = "x-homefire-weights"
DOWNLOADS_PATH = "/api/v1/downloads"
"""Files of checkpoints behind signed links: the gateway lets reads of it through without a key."""


class ServiceHealth(msgspec.Struct, frozen=True):
    """Adoption proves a process by this nonce, never by its pid alone."""

    nonce: str
    pid: int
    service: str


class TrainerState(StrEnum):
    """What a trainer front is doing."""

    STARTING = "starting"
    """The engine loads the model."""
    RECOVERING = "recovering"
    """A recovery point was loaded and the journal is being replayed."""
    READY = "ready"
    """Operations run."""
    STOPPING = "stopping"
    """SIGTERM came; the current operation finishes and a recovery point is written."""
    FAILED = "failed"
    """The engine cannot start; `error` says why. The front stays up to say so."""


class GraphStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Graphs kept between the two calls of a custom loss."""

    budget_bytes: int = 0
    held_bytes: int = 0
    """At most: as of the last pass, or 0 once all have expired."""
    num_held: int = 0
    num_reused: int = 0
    """Backwards that ran alone, since the front started."""
    num_recomputed: int = 0
    """Backwards that found their graph gone and ran its forward again."""


class ReplayProgress(msgspec.Struct, frozen=True):
    """How far a recovery has come."""

    num_done: int
    num_total: int
    """Operations since the recovery point that it began with, forward passes included."""


class TrainerStatus(msgspec.Struct, frozen=True, kw_only=True):
    version: int
    nonce: str
    state: TrainerState
    step: int = 0
    """Optimizer steps applied to the policy slot; in a pool, to the models that it remembers."""
    num_accepted: int = 0
    num_applied: int = 0
    engine_restarts: int = 0
    replayed: int = 0
    """Operations done again, since the front started."""
    replaying: ReplayProgress | None = None
    """While it recovers."""
    num_unsaved: int = 0
    """Operations applied since the newest recovery point: what a death now would replay."""
    detail: str = ""
    error: ErrorRecord | None = None
    graphs: GraphStatus = GraphStatus()


class HotLoadStage(StrEnum):
    """Stage of a replica's hot load, as the Fireworks status reports it."""

    IDLE = "idle"
    """Nothing is being loaded."""
    LOADING = "loading"
    """The chain is read and applied beside the live weights."""
    DRAINING = "draining"
    """New sequences wait while running ones finish on the old weights."""
    ERROR = "error"
    """The last load failed; the old weights still serve."""


class CanaryVerdict(StrEnum):
    """What scoring a fixed text said of loaded weights; see `homefire.checkpoints.canary`."""

    PASS = "pass"
    """They answer as their manifest says, and as the weights before them do not."""
    INCONCLUSIVE = "inconclusive"
    """They answer as their manifest says, but so nearly would the weights before them."""
    MISMATCH = "mismatch"
    """They answer otherwise. They were not served."""
    ABSENT = "absent"
    """Their manifest has no canary: the base model, a merged or an older snapshot."""


class SnapshotLocation(msgspec.Struct, frozen=True):
    """Which bucket of the store an identity is looked up in."""

    account: str
    job: str
    slot: str = POLICY_SLOT


class Transition(StrEnum):
    """What a change of weights does to requests, of which some run and some come."""

    DRAIN = "DRAIN"
    """What runs ends on the old weights; what comes waits for the new ones."""
    SYNC = "SYNC"
    """What runs ends on the old weights; what comes is refused (425) until the new ones serve."""
    ASYNC = "ASYNC"
    """What runs goes on in place under the new weights, each token named; what comes finds them."""


class Drain(StrEnum):
    """What happens when running requests take longer than the drain has time."""

    BOUNDED = "bounded"
    """They go on in place under the new weights, each token named, and the ledger counts them."""
    STRICT = "strict"
    """The load fails, and they end on the old weights."""


class HotLoadRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Load `identity`; None goes back to the base model. Answered at once, done in the background."""

    identity: str | None
    location: SnapshotLocation | None = None
    digest: str = ""
    """What the snapshot's weights must hash to; empty: what its manifest says."""
    reset_prompt_cache: bool = True
    """Free what is cached of prompts. It is never used under other weights than it was made with."""
    transition: Transition = Transition.DRAIN
    drain: Drain = Drain.BOUNDED
    drain_timeout_s: float | None = None
    """None: the replica's own."""


class LedgerEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One change of the weights that a replica serves, or one failed attempt."""

    identity: str
    digest: str
    at: float
    """Unix time in seconds."""
    ok: bool
    load_ms: float = 0.0
    """Reading, applying and verifying, while the old weights serve."""
    drain_ms: float = 0.0
    """Waiting for running sequences, while new ones wait."""
    canary: CanaryVerdict = CanaryVerdict.ABSENT
    num_stragglers: int = 0
    """Sequences that had begun on the weights before and went on under these."""
    reseeded: bool = False
    """Read again whole, from its base in the store, after what was applied to the held weights was wrong."""
    error: str = ""
    error_code: str = ""
    """Of the tree in `errors.py`, e.g. `canary_mismatch`."""


class ReplicaStatus(msgspec.Struct, frozen=True, kw_only=True):
    version: int
    nonce: str
    ready: bool
    """The engine serves completions."""
    identity: str | None
    """The snapshot served; None while it is the base model."""
    digest: str
    """Digest of the weights in memory."""
    canary: CanaryVerdict = CanaryVerdict.ABSENT
    """What the canary said of them when they were loaded."""
    attested_by: str = ""
    """What the digest was taken of, e.g. `memory`."""
    stage: HotLoadStage = HotLoadStage.IDLE
    target: str | None = None
    """The identity being loaded, or whose load failed."""
    error: str = ""
    error_code: str = ""
    running: int = 0
    queued: int = 0
    num_asked: int = 0
    """Completions asked for since it started: who is asked is in use, also between two looks at it."""
    ledger: list[LedgerEntry] = []


class TrainerRoute(msgspec.Struct, frozen=True):
    state: str
    """The job's state, e.g. `JOB_STATE_RUNNING`."""
    upstream: Upstream | None
    detail: str = ""


class DeploymentRoute(msgspec.Struct, frozen=True):
    state: str
    replicas: list[Upstream]
    """Replicas that answer; empty while the deployment is starting or parked."""
    detail: str = ""
    is_asleep: bool = False
    """It has no replica because it was scaled to none, and the next request starts one."""


class KeyRoute(msgspec.Struct, frozen=True):
    sha256: str
    """Hex digest of the key's text, without a surplus `tml-` before a key that has none."""
    account: str


class RouteTable(msgspec.Struct, frozen=True, kw_only=True):
    """All that the gateway needs to route without asking control. Keys are `account/id`."""

    version: int
    keys: list[KeyRoute] = []
    trainers: dict[str, TrainerRoute] = {}
    deployments: dict[str, DeploymentRoute] = {}
    models: dict[str, str] = {}
    """`account/name` of a deployed base model, by each of its names -> the key of the one
    deployment of that account that serves it."""


class NewRun(msgspec.Struct, frozen=True, kw_only=True):
    """A root session creates a model. The same run again is the same run."""

    account: str
    session_id: str
    model_seq_id: int
    base_model: str | None = None
    """As the client named it; None when it comes from the checkpoint at `path`."""
    path: str | None = None
    rank: int | None = None
    """0: full parameter. None: what the checkpoint has, else the protocol's default."""
    user_metadata: dict[str, str] = {}


class RunPlace(msgspec.Struct, frozen=True):
    """Which job trains a run; its route may still be on its way."""

    run: str
    job: str


class SnapshotRef(msgspec.Struct, frozen=True):
    """A request names a snapshot as its model, in no sampling session."""

    account: str
    path: str
    """`tinker://<run>/sampler_weights/<name>`"""


class SamplerPlace(msgspec.Struct, frozen=True):
    """The deployment that serves it; its route may still be on its way."""

    sampler: str


class Wake(msgspec.Struct, frozen=True):
    """A request came for a job that is paused, or a deployment that is parked or scaled to zero: start it
    again."""

    account: str
    service: str
    """Id of the job or deployment."""
