"""One service process that the supervisor starts, watches and starts again."""

from __future__ import annotations

import signal
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

from homefire.cli.tail import last_lines
from homefire.foundation.durable import write_file
from homefire.foundation.process import ProcessId, identify


@dataclass(frozen=True)
class ServiceCommand:
    name: str
    """`gateway` or `control`."""
    words: list[str]
    log: Path
    record: Path
    """Where its process is written down, as a ServiceRecord."""
    descriptors: tuple[int, ...] = ()
    """Inherited by the process."""


class ServiceRecord(msgspec.Struct, frozen=True):
    """Content of `run/gateway.json` and `run/control.json`."""

    process: ProcessId


class Service:
    """A process in a session of its own, so that Ctrl-C in the terminal reaches only the supervisor.

    `exited(service, status)` is called on a thread of its own when the process has ended.
    """

    def __init__(self, command: ServiceCommand, exited: Callable[[Service, int], None]) -> None:
        self.name = command.name
        self.failures = 0
        """Times in a row that it died young."""
        self._command = command
        self._exited = exited
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self._command.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command.words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=self._command.descriptors,
                start_new_session=True,
            )
        pid = self._process.pid
        record = ServiceRecord(identify(pid) or ProcessId(pid, 0))
        write_file(self._command.record, msgspec.json.encode(record))
        threading.Thread(target=self._watch, args=(self._process,), daemon=True).start()

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def signal(self, number: signal.Signals) -> None:
        if self._process is not None and self.is_running:
            self._process.send_signal(number)

    def wait(self) -> None:
        if self._process is not None:
            self._process.wait()

    def log_tail(self, count: int = 15) -> str:
        return "\n".join(last_lines(self._command.log, count))

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        self._exited(self, process.wait())


def read_service_record(path: Path) -> ServiceRecord | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=ServiceRecord)
    except (FileNotFoundError, msgspec.DecodeError):
        return None
