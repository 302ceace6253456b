"""What a process is started with: one JSON file of mode 0600, named on its command line.

`homefire` never puts a secret on a command line or in the environment of a child.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TypeVar

import msgspec


class TrainerMode(StrEnum):
    """What a trainer job's policy slot is. The values are the training shapes' `trainerMode`."""

    FULL = "POLICY_TRAINER"
    """All parameters train (lora_rank 0)."""
    LORA = "LORA_TRAINER"
    """A low-rank adapter trains on a frozen base (lora_rank > 0)."""
    FORWARD_ONLY = "FORWARD_ONLY"
    """A frozen reference model: forward passes only."""


class EngineKind(StrEnum):
    """Which implementation of the engine protocols a service runs."""

    TORCH = "torch"
    """Real transformers models."""
    FAKE = "fake"
    """A numpy bigram model: deterministic, trains for real, starts in half a second. For tests."""


class Accelerator(StrEnum):
    """What engines compute on. The values are torch's device types."""

    CPU = "cpu"
    """In float32; the same bits every time."""
    CUDA = "cuda"
    """In the serving dtype, with float32 masters."""


class Upstream(msgspec.Struct, frozen=True):
    """Where a service listens, and the secret that it demands in `x-homefire-secret`."""

    socket: str
    secret: str


class ActivationBudget(msgspec.Struct, frozen=True, kw_only=True):
    """What a backward pass may keep of its forward. Found once per job and stored, as bits on an
    accelerator depend on it."""

    max_bytes: int
    """Of one micro-batch's activations on each rank."""
    layer_token_bytes: int
    """What one decoder layer keeps of a token."""
    input_token_bytes: int
    """What is left of that when the layer is computed again in backward: its input."""
    num_layers: int


class PassBudget(msgspec.Struct, frozen=True, kw_only=True):
    """How batches are cut: what an engine finds once for a job on an accelerator."""

    micro_batch_tokens: int
    activations: ActivationBudget


class TrainerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One trainer service (front + engine) of one job."""

    name: str
    nonce: str
    listen: Upstream
    account: str
    job: str
    base_model: str
    """As the client named it, e.g. `accounts/fireworks/models/qwen3-8b`."""
    model_dir: str
    """The Hugging Face directory that it resolved to."""
    tokenizer_id: str
    """What `get_info` gives clients as the tokenizer: a repository, or a directory."""
    mode: TrainerMode
    lora_rank: int
    """Of a dedicated job's adapter. In a pool, the highest rank that a model may ask for; 0: 256."""
    max_context_length: int
    threads: int
    """Of each rank."""
    accelerator: Accelerator = Accelerator.CPU
    store_root: str
    job_dir: str
    """Journal, recovery points, events.jsonl and logs of this job."""
    engine: EngineKind = EngineKind.TORCH
    pooled: bool = False
    """A root plane's trainer: every model has a slot of its own, named after it; sessions are the
    gateway's business."""
    sampler: str = ""
    """The deployment that samples what this job saves: ephemeral saves name sampling sessions of it.
    Empty for a dedicated job, which has none."""
    promoted_models: str = ""
    """Where promoted models lie, by account and id; empty: there are none."""
    model_roots: list[str] = []
    """Directories that a path from a client may lead into."""
    micro_batch_tokens: int = 2048
    """Token budget of one micro-batch, and of each rank's share; part of the journaled plan, so fixed per job."""
    activations: ActivationBudget | None = None
    """Micro-batches over it recompute layers in backward; None: all is kept."""
    held_graph_bytes: int | None = None
    """What graphs kept between the two calls of a custom loss may take in memory; 0: none is kept,
    None: an eighth of the memory of the engine's device."""
    held_graph_limit_s: float = 300.0
    """How long such a graph is kept for a second call that does not come."""
    ranks: int = 1
    """Processes that the engine's parameters and rows are divided among; fixed per job, like its bits. A
    fake engine is one process whatever they are."""
    rank_timeout_s: float = 600.0
    """How long ranks wait for one another before the engine is started anew."""
    snapshot_cap_bytes: int = 64 << 30
    """A sampler snapshot or state above this is refused; a warning is given from 80 % of it."""
    recovery_interval_s: float = 60.0
    journal_cap_bytes: int = 4 << 30
    """Above it results that nobody fetched are moved, so that old segments can go; a quarter of it since
    the last recovery point brings the next one early. What replays need is never given up."""
    keep_journal: bool = False
    """The journal is never trimmed, so that the whole job can be replayed from its base model."""
    max_open_models: int = 64
    """Models with weights of their own that a pool holds in memory at a time."""
    gap_timeout_s: float = 600.0
    """How long requests are held behind a missing seq_id before they fail."""


class ReplicaSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One inference replica of one deployment."""

    name: str
    nonce: str
    listen: Upstream
    account: str
    deployment: str
    replica: int
    base_model: str
    """A resource name, `accounts/<a>/models/<m>`: the stem of `model` in responses."""
    model_dir: str
    max_context_length: int
    threads: int
    store_root: str
    replica_dir: str
    accelerator: Accelerator = Accelerator.CPU
    engine: EngineKind = EngineKind.TORCH
    samples_job: str = ""
    """The job in whose part of the store Tinker sampling sessions find their snapshots; empty: none."""
    max_running: int = 64
    """Sequences decoded together."""
    max_queued: int = 4096
    """Requests waiting before new ones are shed with 429."""
    max_queued_tokens: int = 8 << 20
    """The same of their prompts' tokens: what waits takes memory."""
    max_adapters: int = 16
    """LoRA snapshots held in memory at once; idle ones make room for others."""
    max_adapter_bytes: int = 2 << 30
    """Of all of them together."""
    max_prefix_bytes: int = 1 << 30
    """Keys and values kept of prompts for later ones that begin alike; memory is taken as it fills."""
    drain_timeout_s: float = 90.0


class ControlSpec(msgspec.Struct, frozen=True, kw_only=True):
    home: str
    nonce: str
    listen: Upstream
    public_url: str
    """What clients reach the gateway at, e.g. `http://127.0.0.1:8700`."""
    aliases: dict[str, str] = {}
    model_roots: list[str] = []
    engine: EngineKind = EngineKind.TORCH
    accelerator: Accelerator = Accelerator.CPU
    """Of every trainer and replica."""
    keep_journals: bool = False
    """Trainers never trim their journals: `TrainerSpec.keep_journal`."""
    held_graph_bytes: int | None = None
    """Of every trainer; see TrainerSpec."""
    pool_idle_s: float = 1800.0
    """A root plane's trainer or sampler that nobody used for so long is parked; 0 = never."""
    tombstone_retention_s: float = 30 * 86400.0
    """How long a deleted job's checkpoints stay."""
    capacity_threads: int = 0
    """Engine threads that may be handed out; 0 = twice the cores (an idle engine costs nothing)."""
    capacity_memory_bytes: int = 0
    """0 = what the machine has, less a reserve."""


class GatewaySpec(msgspec.Struct, frozen=True, kw_only=True):
    home: str
    nonce: str
    host: str
    port: int
    listen: Upstream
    """A Unix socket for the supervisor's own health question; clients use host and port."""
    control: Upstream
    tls_certificate: str | None = None
    tls_key: str | None = None
    allowed_hosts: list[str] = []
    """Host headers accepted, against DNS rebinding; loopback names are always accepted."""


Spec = TypeVar("Spec", TrainerSpec, ReplicaSpec, ControlSpec, GatewaySpec)


def read_spec(path: Path, kind: type[Spec]) -> Spec:
    return msgspec.json.decode(path.read_bytes(), type=kind)
