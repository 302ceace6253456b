"""A launcher in memory: its processes live until a script ends them. For tests of supervision.

launcher = FakeLauncher(clock, on_start=lambda process: fronts.serve(process.spec))
launcher.process("trainer job-1").exit(1, log=["out of memory"])
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from homefire.foundation.clock import Clock
from homefire.foundation.process import ProcessId
from homefire.launch.protocol import Exit, ProcessRecord, ProcessSpec
from homefire.wire.errors import HomefireError

BOOT = "fake-boot"


class FakeProcess:
    """One started process. SIGTERM ends it, unless it is `deaf`: then it dies by SIGKILL only.

    With `hold_sigterm` it takes its time: `stop` waits until the script calls `exit`.
    """

    def __init__(self, spec: ProcessSpec, record: ProcessRecord) -> None:
        self.spec = spec
        self.record = record
        self.deaf = False
        self.hold_sigterm = False
        self.log: list[str] = []
        self.signals: list[str] = []
        self.ended: Exit | None = None
        self._ended = asyncio.Event()

    @property
    def alive(self) -> bool:
        return self.ended is None

    def exit(self, code: int | None, *, log: list[str] | None = None) -> None:
        self.log.extend(log or [])
        self.ended = Exit(code)
        self._ended.set()

    def terminate(self) -> None:
        self.signals.append("SIGTERM")
        if not self.deaf and not self.hold_sigterm:
            self.exit(0)

    def kill(self) -> None:
        self.signals.append("SIGKILL")
        self.exit(-9)

    async def wait(self) -> Exit:
        await self._ended.wait()
        assert self.ended is not None
        return self.ended


class FakeLauncher:
    """Outlives the control planes under test, as a machine does: give one to both."""

    def __init__(
        self, clock: Clock, *, on_start: Callable[[FakeProcess], None] | None = None
    ) -> None:
        self._clock = clock
        self._on_start = on_start
        self.started: list[FakeProcess] = []
        """Every process ever started, oldest first."""
        self.refusals: list[HomefireError] = []
        """Raised, one per start, before any process is made."""

    def process(self, name: str) -> FakeProcess:
        """The newest process of that name."""
        return next(p for p in reversed(self.started) if p.spec.name == name)

    def running(self, name: str | None = None) -> list[FakeProcess]:
        return [p for p in self.started if p.alive and name in (None, p.spec.name)]

    async def start(self, spec: ProcessSpec) -> ProcessRecord:
        if self.refusals:
            raise self.refusals.pop(0)
        process = ProcessId(1000 + len(self.started), len(self.started))
        record = spec.record(process=process, boot=BOOT, started_at=self._clock.now())
        self.started.append(FakeProcess(spec, record))
        if self._on_start is not None:
            self._on_start(self.started[-1])
        return record

    async def find(self, record: ProcessRecord) -> ProcessRecord | None:
        return next(
            (p.record for p in self.started if p.alive and p.record.nonce == record.nonce), None
        )

    def poll(self, record: ProcessRecord) -> Exit | None:
        process = self._process_of(record)
        return Exit(None) if process is None else process.ended

    async def wait(self, record: ProcessRecord) -> Exit:
        process = self._process_of(record)
        return Exit(None) if process is None else await process.wait()

    async def stop(self, record: ProcessRecord, *, grace_s: float) -> Exit:
        process = self._process_of(record)
        if process is None:
            return Exit(None)
        if process.alive:
            process.terminate()
        if process.alive and not process.hold_sigterm:
            process.kill()
        return await process.wait()

    async def logs(self, record: ProcessRecord, *, lines: int) -> list[str]:
        process = self._process_of(record)
        return [] if process is None else process.log[-lines:]

    def _process_of(self, record: ProcessRecord) -> FakeProcess | None:
        return next((p for p in self.started if p.record.process == record.process), None)
