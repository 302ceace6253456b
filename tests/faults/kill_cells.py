"""A long run of the real `tinker` client, during which one process is killed at each of many cells.

A cell is a failpoint (where), an operation (of what) and a phase (when the failpoint is reached for the
n-th time since the operation was sent: taken on, or applied).
"""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import tinker

from faults.chaos_proxy import ChaosProxy, chaos_proxy
from faults.front_process import SECRET
from faults.history import objections
from faults.preloaded import ImmortalFront, Nursery
from homefire.checkpoints.tiny import ensure_tiny
from homefire.foundation.events import read_events
from homefire.wire.specs import EngineKind, TrainerMode, TrainerSpec, Upstream


class Op(StrEnum):
    CREATE = "create_model"
    BACKWARD = "forward_backward"
    STEP = "optim_step"
    FORWARD = "forward"
    SAVE = "save_weights"
    SNAPSHOT = "save_weights_for_sampler"
    LOAD = "load_weights"


class Phase(StrEnum):
    TAKEN_ON = "taken on"
    RUN = "run"
    APPLIED = "applied"
    ANSWERED = "answered"
    STOPPING = "stopping"


@dataclass(frozen=True)
class Cell:
    failpoint: str
    op: Op
    phase: Phase
    count: int = 1
    """The kill is when the failpoint is reached for this time since the operation was sent."""

    @property
    def action(self) -> str:
        return f"{self.failpoint}=kill@{self.count}"

    def __str__(self) -> str:
        return f"{self.failpoint} of {self.op}, {self.phase}"


_ANY_OPERATION = (
    ("admission.before_journal", Phase.TAKEN_ON, 1),
    ("journal.before_write", Phase.TAKEN_ON, 1),
    ("journal.before_fsync", Phase.TAKEN_ON, 1),
    ("journal.after_fsync_before_ack", Phase.TAKEN_ON, 1),
    ("worker.before_run", Phase.RUN, 1),
    ("engine.before_run", Phase.RUN, 1),
    ("engine.before_reply", Phase.RUN, 1),
    ("journal.before_applied", Phase.APPLIED, 1),
    ("journal.before_fsync", Phase.APPLIED, 2),
    ("journal.after_fsync_before_ack", Phase.APPLIED, 2),
    ("front.before_result", Phase.ANSWERED, 1),
)
_SAVES = (
    ("durable.before_publish", Phase.RUN, 1),
    ("durable.after_publish", Phase.RUN, 1),
    ("store.before_commit", Phase.RUN, 1),
    ("store.after_commit", Phase.RUN, 1),
)
_POINTS = (
    ("durable.before_publish", Phase.STOPPING, 1),
    ("durable.after_publish", Phase.STOPPING, 1),
    ("points.before_record", Phase.STOPPING, 1),
    ("journal.before_fsync", Phase.STOPPING, 1),
    ("points.before_roll", Phase.STOPPING, 1),
    ("journal.before_name", Phase.STOPPING, 1),
    ("journal.after_name", Phase.STOPPING, 1),
    ("points.before_trim", Phase.STOPPING, 1),
)


_OF_A_SAVE = {
    "worker.before_run": "save.before_taken",
    "journal.before_applied": "save.after_taken",
}
"""A save is taken in its place and written beside training, so it has other places on the way."""


def _cell(failpoint: str, op: Op, phase: Phase, count: int) -> Cell:
    is_save = op in (Op.SAVE, Op.SNAPSHOT)
    return Cell(_OF_A_SAVE.get(failpoint, failpoint) if is_save else failpoint, op, phase, count)


def fake_cells() -> list[Cell]:
    """Rounds of all operations, each round at another place; then points, after two operations."""
    anywhere = [_cell(name, op, phase, n) for name, phase, n in _ANY_OPERATION for op in Op]
    saves = [Cell(name, op, phase, n) for name, phase, n in _SAVES for op in (Op.SAVE, Op.SNAPSHOT)]
    points = [
        Cell(name, op, phase, n) for op in (Op.BACKWARD, Op.STEP) for name, phase, n in _POINTS
    ]
    return [*anywhere, *saves, *points]


def torch_cells() -> list[Cell]:
    """Where the engine's own state is at stake."""
    places = _ANY_OPERATION[5:8]
    ops = (Op.BACKWARD, Op.STEP, Op.FORWARD, Op.SAVE, Op.SNAPSHOT, Op.LOAD)
    return [_cell(name, op, phase, n) for name, phase, n in places for op in ops]


@dataclass
class Run:
    """What one client got, and all that can be known of its trainer afterwards."""

    results: list[Any] = field(default_factory=list)
    """Of each operation, in order, as the client had them; without the seconds of a step."""
    missed: list[Cell] = field(default_factory=list)
    """Cells whose failpoint was never reached."""
    num_kills: int = 0
    digest: str = ""
    job_dir: Path = Path()
    proxy: ChaosProxy | None = None


class Walk:
    """One operation of each kind after another, of one training client; numbered, so that data differ."""

    def __init__(self, service: Any, store: Path) -> None:
        self._service = service
        self._store = store
        self._number = 0
        self._model = self._create()
        self._saved = self._model.save_state("s-0").result().path

    def run(self, op: Op) -> Any:
        """Blocks for the result; its plain values."""
        self._number += 1
        match op:
            case Op.CREATE:
                self._model = self._create()
                return None
            case Op.BACKWARD:
                return _plain(self._model.forward_backward(self._data(), "cross_entropy").result())
            case Op.FORWARD:
                return _plain(self._model.forward(self._data(), "cross_entropy").result())
            case Op.STEP:
                adam = tinker.AdamParams(learning_rate=0.01)
                metrics = self._model.optim_step(adam).result().metrics
                return {name: value for name, value in metrics.items() if name != "step_time_s"}
            case Op.SAVE:
                self._saved = self._model.save_state(f"s-{self._number}").result().path
                return self._saved
            case Op.SNAPSHOT:
                name = f"w-{self._number}"
                path = self._model.save_weights_for_sampler(name).result().path
                return path, self.digest(name)
            case Op.LOAD:
                return self._model.load_state(self._saved).result().path

    def digest(self, name: str) -> str:
        """Of a snapshot that exists when it is reported, or there is none."""
        (manifest,) = self._store.glob(f"**/sampler/{name}/manifest.json")
        return json.loads(manifest.read_bytes())["digest"]

    def _create(self) -> Any:
        return self._service.create_lora_training_client("tiny", rank=0).result()

    def _data(self) -> list[Any]:
        rows = [[1 + (3 * self._number + 5 * row + n) % 60 for n in range(6)] for row in range(3)]
        return [
            tinker.Datum(
                model_input=tinker.ModelInput.from_ints(row[:-1]),
                loss_fn_inputs={"target_tokens": row[1:], "weights": [0.0, 1.0, 1.0, 1.0, 0.5]},
            )
            for row in rows
        ]


def walk(
    root: Path,
    nursery: Nursery,
    failpoints: Path,
    cells: Sequence[Cell],
    *,
    armed: bool,
    engine: EngineKind = EngineKind.FAKE,
    kill: Callable[[ImmortalFront, Cell], None] | None = None,
    **proxy_options: Any,
) -> Run:
    """The operations of the cells in their order; `armed`: with a kill at each."""
    run = Run()
    with _client(root, nursery, failpoints, engine, proxy_options) as (front, proxy, service):
        run.job_dir, run.proxy = Path(front.spec.job_dir), proxy
        steps = Walk(service, Path(front.spec.store_root))
        for cell in cells:
            if cell.op is Op.STEP:  # of a gradient that is not nothing
                run.results.append(steps.run(Op.BACKWARD))
            run.results.append(_operate(front, steps, cell, run, armed=armed))
        steps.run(Op.SNAPSHOT)
        run.digest = steps.digest(f"w-{steps._number}")
        run.num_kills = _num_deaths(run.job_dir)
    return run


def assert_as_if_nothing_had_happened(killed: Run, quiet: Run) -> None:
    assert killed.missed == []
    assert objections(killed.job_dir, killed.proxy.exchanges) == []
    assert killed.results == quiet.results
    assert killed.digest == quiet.digest


def _operate(front: ImmortalFront, steps: Walk, cell: Cell, run: Run, *, armed: bool) -> Any:
    if not armed:
        return steps.run(cell.op)
    if cell.phase is not Phase.STOPPING:
        front.arm(cell.action)
        result = steps.run(cell.op)
    else:
        result = steps.run(cell.op)
        front.arm(cell.action)
        process = front.process
        process.send_signal(signal.SIGTERM)
        process.block()
    if front.is_armed:
        run.missed.append(cell)
        front.disarm()
    return result


def _num_deaths(job_dir: Path) -> int:
    """Of fronts and engines by SIGKILL: lives of either, less those that ended well or with a front."""
    events = [event for _, event in read_events(job_dir / "events.jsonl")]
    fronts = sum(event["event"] == "started" for event in events) - 1
    engines = sum(event["event"] == "engine_died" for event in events)
    return fronts + engines


@contextlib.contextmanager
def _client(
    root: Path,
    nursery: Nursery,
    failpoints: Path,
    engine: EngineKind,
    proxy_options: dict[str, Any],
) -> Iterator[tuple[ImmortalFront, ChaosProxy, Any]]:
    front = ImmortalFront(nursery, _spec(root, engine), failpoints)
    try:
        with chaos_proxy(front.spec.listen.socket, SECRET, **proxy_options) as proxy:
            service = tinker.ServiceClient(base_url=proxy.url, api_key="tml-any")
            try:
                yield front, proxy, service
            finally:
                service.close("success")
    finally:
        front.close()


def _plain(result: Any) -> Any:
    rows = [{name: value.tolist() for name, value in row.items()} for row in result.loss_fn_outputs]
    return result.metrics, rows


def _spec(root: Path, engine: EngineKind) -> TrainerSpec:
    model_dir, job_dir = root / "model", root / "job"
    job_dir.mkdir(parents=True)
    if engine is EngineKind.TORCH:
        ensure_tiny(model_dir)
    else:
        model_dir.mkdir()
        config = {"vocab_size": 64, "max_position_embeddings": 32}
        (model_dir / "config.json").write_text(json.dumps(config))
    return TrainerSpec(
        name="job-1",
        nonce="nonce",
        listen=Upstream(str(root / "front.sock"), SECRET),
        account="local",
        job="job-1",
        base_model="tiny",
        model_dir=str(model_dir),
        tokenizer_id="tiny",
        mode=TrainerMode.FULL,
        lora_rank=0,
        max_context_length=32,
        threads=1,
        store_root=str(root / "store"),
        job_dir=str(job_dir),
        engine=engine,
        keep_journal=True,
    )
