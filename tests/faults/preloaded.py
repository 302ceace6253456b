"""Real fronts and engines, forked from a process that has imported all they need.

A start costs a few hundredths of a second instead of seconds, so that hundreds of real kills are cheap.
What differs from production is how a process begins, nothing else; `test_front_deaths.py` has the rest.

    python -m faults.preloaded torch|fake [BUG]     asked over its standard input, a socket

`BUG` names one of `planted_front.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from homefire.foundation.durable import write_file
from homefire.foundation.failpoints import FILE_VARIABLE
from homefire.trainer.front.engine_process import EngineProcess
from homefire.wire.specs import TrainerSpec, read_spec

_PR_SET_PDEATHSIG = 1


class Forked:
    """A process that is not our child, by its descriptor."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        try:
            self._descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            self._descriptor, self.returncode = -1, -signal.SIGKILL

    def send_signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            if self.returncode is None:
                signal.pidfd_send_signal(self._descriptor, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def block(self) -> None:
        """Until it has ended."""
        if self.returncode is None:
            select.select([self._descriptor], [], [])
            self._note_end()

    async def wait(self) -> int:
        if self.returncode is None:
            loop, ended = asyncio.get_running_loop(), asyncio.Event()
            watched = os.dup(self._descriptor)
            loop.add_reader(watched, ended.set)
            try:
                await ended.wait()
            finally:
                loop.remove_reader(watched)
                os.close(watched)
            self._note_end()
        return self.returncode or 0

    def _note_end(self) -> None:
        self.returncode = -signal.SIGKILL

    def __del__(self) -> None:
        """Not before: several threads may wait for one end, and the number is soon another's."""
        if self._descriptor >= 0:
            os.close(self._descriptor)


class Nursery:
    """The process that is forked; everything it has begun ends with it."""

    def __init__(self, kind: str, failpoints: Path, *, bug: str = "") -> None:
        ours, theirs = socket.socketpair()
        environment = {**os.environ, FILE_VARIABLE: str(failpoints), "OMP_NUM_THREADS": "1"}
        tests = str(Path(__file__).parents[1])
        environment["PYTHONPATH"] = os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, "-m", "faults.preloaded", kind, bug]
        self._process = subprocess.Popen(command, stdin=theirs, env=environment)
        theirs.close()
        self._socket = ours
        self._lock = threading.Lock()

    def front(self, spec_file: Path, log: Path) -> Forked:
        asked = {"start": "front", "spec": str(spec_file), "log": str(log)}
        with self._lock:
            return Forked(_ask(self._socket, asked, []))

    def close(self) -> None:
        self._socket.close()
        self._process.wait(30)


class ImmortalFront:
    """A front that is started again whenever it dies, while a client talks to it."""

    def __init__(self, nursery: Nursery, spec: TrainerSpec, failpoints: Path) -> None:
        self.spec = spec
        self._nursery, self._failpoints = nursery, failpoints
        self._spec_file = Path(spec.job_dir).with_name("spec.json")
        self._spec_file.write_bytes(msgspec.json.encode(spec))
        self._closing = False
        self.num_starts = 0
        self.process = self._start()
        self._watch = threading.Thread(target=self._start_again_and_again, daemon=True)
        self._watch.start()

    def arm(self, failpoint: str) -> None:
        write_file(self._failpoints, failpoint.encode())

    def disarm(self) -> None:
        self._failpoints.unlink(missing_ok=True)

    @property
    def is_armed(self) -> bool:
        return self._failpoints.exists()

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def close(self) -> None:
        self._closing = True
        self.process.kill()
        self._watch.join()

    def _start(self) -> Forked:
        self.num_starts += 1
        log = Path(self.spec.job_dir) / "front.log"
        return self._nursery.front(self._spec_file, log)

    def _start_again_and_again(self) -> None:
        while True:
            self.process.block()
            if self._closing:
                return
            self.process = self._start()
            if self._closing:
                self.process.kill()


# In the nursery ----------------------------------------------------------------------------------


def _main(kind: str, bug: str) -> None:
    with socket.socket(fileno=os.dup(0)) as asked:
        _import_all(kind)
        if bug:
            getattr(importlib.import_module("faults.planted_front"), bug)()
        gc.freeze()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        _serve(asked)


def _import_all(kind: str) -> None:
    importlib.import_module("homefire.trainer.front.api")
    engine = "torch_engine" if kind == "torch" else "fake"
    importlib.import_module(f"homefire.trainer.engine.{engine}")


def _serve(parent: socket.socket) -> None:
    """Forks for whoever asks: the test, or a front that wants an engine."""
    askers = [parent]
    while True:
        for asker in select.select(askers, [], [])[0]:
            data, descriptors, _, _ = socket.recv_fds(asker, 1 << 16, 1)
            if not data and asker is parent:
                return
            if not data:
                askers.remove(asker)
                asker.close()
                continue
            asked = json.loads(data)
            ours, theirs = socket.socketpair()
            pid = os.fork()
            if pid == 0:
                _begin(asked, [*askers, ours], theirs, descriptors)
            theirs.close()
            for descriptor in descriptors:
                os.close(descriptor)
            askers.append(ours)
            asker.sendall(json.dumps({"pid": pid}).encode())


def _begin(
    asked: dict[str, Any], close: list[socket.socket], nursery: socket.socket, given: list[int]
) -> None:
    """In the new process; never returns."""
    status = 1
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for each in close:
            each.close()
        output = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if asked["start"] == "front":
            _front(Path(asked["spec"]), nursery)
        else:
            nursery.close()
            _engine(asked["kind"], given[0])
        status = 0
    finally:
        os._exit(status)


def _front(spec_file: Path, nursery: socket.socket) -> None:
    from homefire.http.serve import serve_unix_until_stopped
    from homefire.trainer.front.api import build_app
    from homefire.trainer.front.service import Front

    spec = read_spec(spec_file, TrainerSpec)
    front = Front(spec, start_engine=_engine_starter(spec, nursery))
    serve_unix_until_stopped(build_app(front), socket=spec.listen.socket, on_stop=front.stop)


def _engine_starter(spec: TrainerSpec, nursery: socket.socket) -> Callable[[], Any]:
    async def start() -> EngineProcess:
        ours, theirs = socket.socketpair()
        log = str(Path(spec.job_dir) / "engine.log")
        asked = {"start": "engine", "kind": spec.engine.value, "log": log}
        with theirs:
            process = Forked(_ask(nursery, asked, [theirs.fileno()]))
        reader, writer = await asyncio.open_connection(sock=ours)
        return EngineProcess(process, reader, writer)

    return start


def _engine(kind: str, descriptor: int) -> None:
    from homefire.trainer.engine.__main__ import build_engine
    from homefire.trainer.engine.serve import serve
    from homefire.wire.specs import EngineKind

    with socket.socket(fileno=descriptor) as connection:
        serve(connection, build_engine(EngineKind(kind)))


def _ask(nursery: socket.socket, asked: dict[str, Any], descriptors: list[int]) -> int:
    socket.send_fds(nursery, [json.dumps(asked).encode()], descriptors)
    return json.loads(nursery.recv(1 << 16))["pid"]


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2])
