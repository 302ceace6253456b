"""What a launcher does: start, find again, say when it ended, stop, and show its log.

A record is all that is needed to deal with a process later, also from a restarted control plane: it
is stored *before* the process is started (with no pid), so that a start that was not written down
any more is found by `find` and nothing runs unseen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import msgspec

from homefire.foundation.process import ProcessId
from homefire.wire.specs import Upstream


class ProcessSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A process to start: `python -m <module> [arguments…] <spec_file>`."""

    name: str
    """For people, e.g. `trainer job-3f9a1c2e`."""
    module: str
    arguments: tuple[str, ...] = ()
    """Between the module and the spec file."""
    spec_file: str
    spec: bytes
    """Content of the spec file, which holds secrets: written with mode 0600 before the start."""
    log_file: str
    """Gets standard output and error, appended."""
    threads: int
    nonce: str
    listen: Upstream | None = None
    """Where the process will answer; None for a worker that only exits."""

    def record(self, *, process: ProcessId | None, boot: str, started_at: float) -> ProcessRecord:
        return ProcessRecord(
            name=self.name,
            nonce=self.nonce,
            listen=self.listen,
            spec_file=self.spec_file,
            log_file=self.log_file,
            process=process,
            boot=boot,
            started_at=started_at,
        )


class ProcessRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A process that was started, or was about to be (`process` is None)."""

    name: str
    nonce: str
    listen: Upstream | None
    spec_file: str
    log_file: str
    process: ProcessId | None
    boot: str
    """Names the boot that the pid belongs to: pids and start ticks repeat after a reboot."""
    started_at: float
    """Unix time in seconds."""


class Exit(msgspec.Struct, frozen=True):
    """How a process ended. `code` is None when it was not our child, negative for a signal."""

    code: int | None

    def __str__(self) -> str:
        if self.code is None:
            return "ended"
        return f"was killed by signal {-self.code}" if self.code < 0 else f"exited with {self.code}"


class Launcher(Protocol):
    """Runs on one event loop; no call blocks it."""

    async def start(self, spec: ProcessSpec) -> ProcessRecord:
        """Writes the spec file and starts the process. Raises StorageFailed or Unavailable."""
        ...

    async def find(self, record: ProcessRecord) -> ProcessRecord | None:
        """The running process of a record that was stored before its start, or None."""
        ...

    def poll(self, record: ProcessRecord) -> Exit | None:
        """None while the process runs. A pid that another process took over has ended."""
        ...

    async def wait(self, record: ProcessRecord) -> Exit:
        """Returns when the process has ended, however it was started."""
        ...

    async def stop(self, record: ProcessRecord, *, grace_s: float) -> Exit:
        """SIGTERM, then SIGKILL after `grace_s` seconds. Signals nothing but this very process."""
        ...

    async def logs(self, record: ProcessRecord, *, lines: int) -> list[str]:
        """The last lines that the process wrote, oldest first."""
        ...


def tail_of(path: Path, *, lines: int, max_bytes: int = 1 << 20) -> list[str]:
    """The last lines of a text file, reading at most `max_bytes` of it; none if it is not there."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - max_bytes))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    return text.splitlines()[-lines:] if lines > 0 else []
