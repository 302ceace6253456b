"""From `save` to the first token of the new weights: a trainer's engine here, a replica of its own there.

A save is timed until it is durable, and on until a token of a completion that names the new weights has
come over the replica's socket: loaded, applied, digest and canary checked. In a directory, and through a
bucket of a small S3 on loopback, where the replica has a cache of its own and downloads.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
from report import Report
from weights import VOCABULARY

from homefire.checkpoints.s3_server import S3Server
from homefire.trainer.engine.saver import Saver
from homefire.trainer.engine.torch_engine import torch_engine
from homefire.trainer.front.plan import execution_plan
from homefire.wire.engine import (
    AdamParams,
    Arrays,
    Failure,
    ForwardBackward,
    LoraSpec,
    OpenModel,
    OpenSlot,
    OptimStep,
    SamplerSaved,
    SaveFinished,
    SaveSampler,
    SlotKind,
)
from homefire.wire.internal import HotLoadRequest, ReplicaStatus, SnapshotLocation
from homefire.wire.specs import ReplicaSpec, Upstream

_FULL_BAR_S, _LORA_BAR_S, _STALL_BAR = 0.7, 0.35, 0.10
_RANK = 32
_RATE = 1e-5
_MEASURED = (128,) * 8
"""Rows of the step that a save is compared with."""
_BETWEEN_SAVES = (64, 64)
"""Enough to move the weights."""


@dataclass
class Trainer:
    """The engine in this process, one thread, with the saver that a service has."""

    model: Path
    store: str
    slot: str
    """`full`, all parameters, or `lora`; also the job's name."""

    def __post_init__(self) -> None:
        self.ended: list[SaveFinished] = []
        self.saver = Saver(self.ended.append)
        self.engine = torch_engine()
        self.engine.open_model(
            OpenModel(
                model_dir=str(self.model),
                base_model="bench",
                store_root=self.store,
                account="local",
                job=self.slot,
                threads=1,
                max_context_length=2048,
            )
        )
        if self.slot == "full":
            opening = OpenSlot(slot=self.slot, kind=SlotKind.FULL)
        else:
            spec = LoraSpec(rank=_RANK, seed=0, train_unembed=False)
            opening = OpenSlot(slot=self.slot, kind=SlotKind.LORA, lora=spec)
        self.engine.open_slot(opening)

    def step(self, lengths: Sequence[int] = _MEASURED) -> float:
        """Seconds of a forward, backward and optimizer step over rows of these lengths."""
        began = time.perf_counter()
        request = ForwardBackward(
            slot=self.slot,
            loss_fn="cross_entropy",
            loss_fn_config={},
            plan=execution_plan(lengths, token_budget=2048, threads=1),
        )
        self.engine.forward_backward(request, _batch(lengths))
        self.engine.optim_step(OptimStep(slot=self.slot, adam=AdamParams(learning_rate=_RATE)))
        return time.perf_counter() - began

    def begin(self, identity: str, checkpoint_type: str) -> float:
        """Seconds that training stands still for a save."""
        began = time.perf_counter()
        request = SaveSampler(slot=self.slot, identity=identity, checkpoint_type=checkpoint_type)
        self.saver.begin(self.engine.prepare_save(request))
        return time.perf_counter() - began

    def save(self, identity: str, checkpoint_type: str) -> SamplerSaved:
        """Durable when it returns."""
        self.begin(identity, checkpoint_type)
        self.saver.finish()
        reply = self.ended[-1].reply
        if isinstance(reply, Failure):
            raise reply.error.exception()
        assert isinstance(reply, SamplerSaved)
        return reply


def _batch(lengths: Sequence[int]) -> Arrays:
    generator = np.random.default_rng(0)
    total = sum(lengths)
    return {
        "tokens": generator.integers(0, VOCABULARY, total).astype(np.int32),
        "lengths": np.array(lengths, np.int32),
        "target_tokens": generator.integers(0, VOCABULARY, (total, 1)),
        "weights": np.ones((total, 1), np.float32),
    }


@dataclass
class Replica:
    """In a process of its own, with a cache of its own."""

    spec: ReplicaSpec
    environment: dict[str, str]
    process: subprocess.Popen[bytes] = field(init=False)

    def __post_init__(self) -> None:
        Path(self.spec.replica_dir).mkdir(parents=True, exist_ok=True)
        path = Path(self.spec.replica_dir) / "spec.json"
        path.write_bytes(msgspec.json.encode(self.spec))
        command = [sys.executable, "-m", "homefire.inference.replica", str(path)]
        environment = {**os.environ, **self.environment, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment)
        self._status: ReplicaStatus | None = None
        while not self._look().ready:
            if self.process.poll() is not None:
                raise RuntimeError("the replica ended before it was ready")

    def load(self, saved: SamplerSaved, identity: str, slot: str) -> ReplicaStatus:
        """Returns when the replica serves it and has said so."""
        location = SnapshotLocation("local", slot, slot)
        body = HotLoadRequest(identity=identity, location=location, digest=saved.digest)
        self._call("POST", "/internal/hot_load", msgspec.json.encode(body))
        while True:
            status = self._look()
            if status.error:
                raise RuntimeError(f"the hot load failed: {status.error}")
            if status.identity == identity:
                return status

    def first_token(self, identity: str) -> None:
        """Of a stream whose response names the weights."""
        body = {
            "model": "accounts/local/deployments/bench",
            "prompt": list(range(1, 17)),
            "max_tokens": 1,
            "stream": True,
        }
        connection = _Connection(self.spec.listen.socket)
        connection.request("POST", "/inference/v1/completions", json.dumps(body), self._headers())
        response = connection.getresponse()
        made_by = response.getheader("x-homefire-weights", "")
        response.read(1)
        connection.close()
        if not made_by.startswith(f"{identity};"):
            raise RuntimeError(f"the token was made by {made_by!r}, not by {identity!r}")

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()

    def _look(self) -> ReplicaStatus:
        """Held until something changes."""
        after = "" if self._status is None else f"?after={self._status.version}&wait_s=5"
        try:
            self._status = msgspec.json.decode(
                self._call("GET", f"/internal/status{after}"), type=ReplicaStatus
            )
        except (FileNotFoundError, ConnectionError):
            time.sleep(0.1)
            if self.process.poll() is not None:
                raise RuntimeError("the replica is gone") from None
            return self._status or _NOT_YET
        return self._status

    def _call(self, method: str, path: str, body: bytes = b"") -> bytes:
        connection = _Connection(self.spec.listen.socket)
        connection.request(method, path, body, self._headers())
        answer = connection.getresponse().read()
        connection.close()
        return answer

    def _headers(self) -> dict[str, str]:
        return {"x-homefire-secret": self.spec.listen.secret, "content-type": "application/json"}


_NOT_YET = ReplicaStatus(version=0, nonce="", ready=False, identity=None, digest="")


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("replica")
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(self._path)


def measure(report: Report, model: Path, directory: Path, *, rounds: int) -> None:
    report.say("save to first token, in a directory")
    _places(report, "directory", model, directory / "local", str(directory / "store"), {}, rounds)
    report.say("save to first token, through S3")
    with S3Server() as server, _environment(server.environment(), directory / "trainer-cache"):
        environment = {
            **server.environment(),
            "HOMEFIRE_STORE_CACHE": str(directory / "replica-cache"),
        }
        url = "s3://bucket/bench"
        _places(report, "S3", model, directory / "s3", url, environment, rounds)


def _places(
    report: Report,
    where: str,
    model: Path,
    directory: Path,
    store: str,
    environment: dict[str, str],
    rounds: int,
) -> None:
    full, lora = Trainer(model, store, "full"), Trainer(model, store, "lora")
    spec = ReplicaSpec(
        name="bench/0",
        nonce="bench",
        listen=Upstream(str(_short(directory)), "secret"),
        account="local",
        deployment="bench",
        replica=0,
        base_model="accounts/local/models/bench",
        model_dir=str(model),
        max_context_length=2048,
        threads=1,
        store_root=store,
        replica_dir=str(directory),
    )
    replica = Replica(spec, environment)
    is_local = where == "directory"
    try:
        if is_local:
            _stall(report, full, rounds)
        for name, trainer, kind, bar in (
            ("full-parameter base", full, "base", None),
            ("full-parameter delta", full, "delta", _FULL_BAR_S if is_local else None),
            ("LoRA r32", lora, "base", _LORA_BAR_S if is_local else None),
        ):
            _journey(report, f"{name}, {where}", trainer, replica, kind, bar, rounds)
    finally:
        replica.stop()


def _journey(
    report: Report,
    name: str,
    trainer: Trainer,
    replica: Replica,
    kind: str,
    bar: float | None,
    rounds: int,
) -> None:
    durable_s, first_token_s, checked = [], [], set[str]()
    for number in range(rounds + 1):  # the first is not counted: files and pools are cold
        trainer.step(_BETWEEN_SAVES)
        identity = f"{trainer.slot}-{kind}-{number}"
        began = time.perf_counter()
        saved = trainer.save(identity, kind)
        durable_s.append(time.perf_counter() - began)
        status = replica.load(saved, identity, trainer.slot)
        replica.first_token(identity)
        first_token_s.append(time.perf_counter() - began)
        checked.add(f"{status.attested_by}, canary {status.canary.value}")
        if status.digest != saved.digest:
            raise RuntimeError(f"{identity} was served with digest {status.digest}")
    report.add(f"save to durable: {name}", statistics.median(durable_s[1:]), "s")
    bars = {} if bar is None else {"at_most": bar}
    report.add(f"save to first token: {name}", statistics.median(first_token_s[1:]), "s", **bars)
    report.say(f"  checked by {'; '.join(sorted(checked))}")


def _stall(report: Report, trainer: Trainer, rounds: int) -> None:
    """Of the full-parameter model, whose copy is the largest; a step is 8 rows of 128 tokens."""
    trainer.step()
    trainer.save("stall-first", "base")
    alone = statistics.median([trainer.step() for _ in range(rounds)])
    stalls, beside = [], []
    for number in range(rounds):
        stalls.append(trainer.begin(f"stall-{number}", "delta"))
        beside.append(trainer.step())
        trainer.saver.finish()
    stall = statistics.median(stalls)
    report.add("step of the 33 M model, 8 rows of 128 tokens", alone, "s")
    report.add("training stalled for a save / a step", stall / alone, at_most=_STALL_BAR)
    report.add("a step while a save is written / a step", statistics.median(beside) / alone)


@contextmanager
def _environment(variables: dict[str, str], cache: Path) -> Iterator[None]:
    """Of this process, where the trainer's engine opens the store."""
    before = dict(os.environ)
    os.environ.update(variables, HOMEFIRE_STORE_CACHE=str(cache))
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _short(directory: Path) -> Path:
    """Sockets have short paths."""
    directory.mkdir(parents=True, exist_ok=True)
    return directory / "r.sock"
