"""A real trainer front with the fake engine, and a client that retries as the real ones do."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec

from homefire.foundation.events import read_events
from homefire.trainer.front.operations import OWN_PASSES_KEY
from homefire.wire.internal import SECRET_HEADER, TrainerState, TrainerStatus
from homefire.wire.specs import EngineKind, TrainerMode, TrainerSpec, Upstream

SECRET = "between services"


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("front", timeout=60)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class FrontProcess:
    """Started again after each death. Failpoints hold for the first life only."""

    def __init__(self, root: Path, *, failpoints: str = "", **spec: Any) -> None:
        root.mkdir(exist_ok=True)
        self.spec = msgspec.structs.replace(_spec(root), **spec)
        self._spec_file = root / "spec.json"
        self._spec_file.write_bytes(msgspec.json.encode(self.spec))
        self._log = root / "front.log"
        self.num_starts = 0
        self.process = self._start(failpoints)

    def call(self, name: str, /, **body: Any) -> dict[str, Any]:
        """One POST, repeated with the same body until a front has answered it."""
        while True:
            try:
                status, answer = self._ask("POST", f"/api/v1/{name}", msgspec.json.encode(body))
            except (OSError, http.client.HTTPException):
                self.process.wait(30)
                self.start_again()
                continue
            assert status in {200, 408}, answer
            return msgspec.json.decode(answer)

    def result(self, request_id: str) -> dict[str, Any]:
        while True:
            answer = self.call("retrieve_future", request_id=request_id)
            if answer.get("type") != "try_again":
                return answer

    def model(self) -> str:
        session = self.call("create_session")["session_id"]
        asked = {"session_id": session, "model_seq_id": 0, "base_model": "tiny"}
        return self.result(self.call("create_model", **asked)["request_id"])["model_id"]

    def pooled_model(self, session: str) -> str:
        """An adapter of rank 4 in a pool that shares no pass with another; any session will do."""
        asked = {"session_id": session, "model_seq_id": 0, "base_model": "tiny"}
        alone = {OWN_PASSES_KEY: "true"}
        made = self.call("create_model", **asked, lora_config={"rank": 4}, user_metadata=alone)
        return self.result(made["request_id"])["model_id"]

    def status(self, *, after: int | None = None) -> TrainerStatus:
        """With `after`, as soon as the version is another one."""
        query = "" if after is None else f"?after={after}&wait_s=20"
        _, answer = self._ask("GET", f"/internal/status{query}")
        return msgspec.json.decode(answer, type=TrainerStatus)

    def await_restarted_engine(self, *, restarts: int) -> None:
        status = self.status()
        while (status.engine_restarts, status.state) != (restarts, TrainerState.READY):
            status = self.status(after=status.version)

    def events(self, name: str) -> list[dict[str, Any]]:
        log = Path(self.spec.job_dir) / "events.jsonl"
        return [event for _, event in read_events(log) if event["event"] == name]

    def kill_engine(self) -> None:
        os.kill(self.events("engine_started")[-1]["pid"], signal.SIGKILL)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """The exit status."""
        self.process.send_signal(number)
        return self.process.wait(30)

    def start_again(self) -> None:
        self.process = self._start("")

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(30)

    def _ask(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        with contextlib.closing(_UnixConnection(self.spec.listen.socket)) as connection:
            connection.request(method, path, body, {SECRET_HEADER: SECRET})
            response = connection.getresponse()
            return response.status, response.read()

    def _start(self, failpoints: str) -> subprocess.Popen[bytes]:
        """Returns when the front listens, or has died before it did."""
        self.num_starts += 1
        environment = {**os.environ, "HOMEFIRE_FAILPOINTS": failpoints}
        with self._log.open("ab") as log:
            command = [sys.executable, "-m", "homefire.trainer.front", str(self._spec_file)]
            process = subprocess.Popen(command, stderr=log, env=environment)
        while not _accepts(self.spec.listen.socket):
            try:
                process.wait(0.02)
            except subprocess.TimeoutExpired:
                continue
            break
        return process


def _accepts(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(path) == 0


def submit_step(front: FrontProcess, model: str, step: int) -> list[str]:
    """Two chunks and an optimizer step; their request ids."""
    seq = 3 * step + 1
    adam = {"learning_rate": 0.05}
    accepted = [
        front.call("forward_backward", **_chunk(model, seq, 3 * step)),
        front.call("forward_backward", **_chunk(model, seq + 1, 3 * step + 1)),
        front.call("optim_step", model_id=model, seq_id=seq + 2, adam_params=adam),
    ]
    return [answer["request_id"] for answer in accepted]


def train(front: FrontProcess, model: str, *, steps: range) -> list[dict[str, Any]]:
    """Results of the optimizer steps, each fetched before the next step is submitted."""
    return [
        [front.result(request_id) for request_id in submit_step(front, model, step)][-1]
        for step in steps
    ]


def digest(front: FrontProcess, model: str, *, seq: int, name: str = "end") -> str:
    """Of the serving weights, by way of a snapshot."""
    saved = front.call("save_weights_for_sampler", model_id=model, seq_id=seq, path=name)
    return front.result(saved["request_id"])["digest"]


def _chunk(model: str, seq: int, salt: int) -> dict[str, Any]:
    full = [(7 * salt + 3 * n) % 60 for n in range(9)]
    targets = {"data": full[1:], "dtype": "int64", "shape": [8]}
    datum = {
        "model_input": {"chunks": [{"tokens": full[:-1]}]},
        "loss_fn_inputs": {"target_tokens": targets},
    }
    given = {"data": [datum, datum], "loss_fn": "cross_entropy"}
    return {"model_id": model, "seq_id": seq, "forward_backward_input": given}


def _spec(root: Path) -> TrainerSpec:
    model_dir, job_dir = root / "model", root / "job"
    model_dir.mkdir(exist_ok=True)
    job_dir.mkdir(exist_ok=True)
    (model_dir / "config.json").write_text('{"vocab_size": 64, "max_position_embeddings": 32}')
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
        engine=EngineKind.FAKE,
    )
