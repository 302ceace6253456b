"""An engine of several real ranks, spoken to as its front does, without the front."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path

from homefire.foundation.failpoints import FILE_VARIABLE as FAILPOINTS_FILE
from homefire.foundation.failpoints import VARIABLE as FAILPOINTS
from homefire.wire.engine import (
    Arrays,
    Failure,
    Reply,
    Request,
    SaveBegun,
    SaveFinished,
    Shutdown,
)
from homefire.wire.engine_frames import decode_reply, encode_request, read_frame


class RankedEngine:
    """`ranks` processes. Raises what the engine reports."""

    def __init__(
        self,
        ranks: int,
        folder: Path,
        *,
        timeout_s: float = 120.0,
        failpoints: str = "",
    ) -> None:
        self.armed = folder / f"armed-{id(self)}"
        """A file that arms a failpoint while the ranks run (`foundation/failpoints.py`)."""
        environment = {FAILPOINTS: failpoints, FAILPOINTS_FILE: str(self.armed)}
        self._ours, first = socket.socketpair()
        self._ours.settimeout(timeout_s)
        pairs = [socket.socketpair() for _ in range(ranks - 1)]
        common = ["--ranks", str(ranks), "--rendezvous", str(folder / f"ranks-{id(self)}")]
        self.processes = [
            _start(
                first,
                *common,
                "--links",
                ",".join(str(a.fileno()) for a, _ in pairs),
                keep=[a for a, _ in pairs],
                environment=environment,
            )
            if ranks > 1
            else _start(first, environment=environment)
        ]
        for rank, (_, theirs) in enumerate(pairs, start=1):
            arguments = (*common, "--rank", str(rank))
            self.processes.append(_start(theirs, *arguments, environment=environment))
        for end in (first, *(end for pair in pairs for end in pair)):
            end.close()

    def ask(self, request: Request, arrays: Arrays | None = None) -> tuple[Reply, Arrays]:
        """The answer; that of a save is what became of it."""
        self._ours.sendall(encode_request(request, arrays))
        reply, found = self._hear(request)
        if isinstance(reply, SaveBegun | SaveFinished):
            both = (reply, self._hear(request)[0])
            reply = next(each.reply for each in both if isinstance(each, SaveFinished))
        if isinstance(reply, Failure):
            raise reply.error.exception()
        return reply, found

    def _hear(self, request: Request) -> tuple[Reply, Arrays]:
        frame = read_frame(self._ours)
        if frame is None:
            raise EOFError(f"the engine ended in {type(request).__name__}")
        return decode_reply(frame)

    def close(self) -> list[int]:
        """Exit statuses."""
        with contextlib.suppress(OSError, EOFError):
            self.ask(Shutdown())
        self._ours.close()
        return [process.wait(60) for process in self.processes]


def _start(
    end: socket.socket,
    *arguments: str,
    keep: list[socket.socket] | None = None,
    environment: dict[str, str],
):
    inherited = [end, *(keep or [])]
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "homefire.trainer.engine",
            "--fd",
            str(end.fileno()),
            "--kind",
            "torch",
            *arguments,
        ],
        pass_fds=[s.fileno() for s in inherited],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
