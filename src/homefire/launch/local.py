"""Processes of this machine, each in a session of its own so that they outlive who started them."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import msgspec

from homefire.foundation.clock import Clock, SystemClock
from homefire.foundation.durable import write_private
from homefire.foundation.process import ProcessId, identify, is_alive, send_signal
from homefire.launch.protocol import Exit, ProcessRecord, ProcessSpec, tail_of
from homefire.wire.errors import StorageFailed, Unavailable

_LOOK_INTERVAL_S = 0.2
"""How often a process is looked at where the kernel has no pidfd (macOS)."""


class LocalLauncher:
    """Starts children, reaps them, and watches processes that an earlier launcher started."""

    def __init__(
        self, *, clock: Clock | None = None, environment: Mapping[str, str] | None = None
    ) -> None:
        self._clock = clock or SystemClock()
        self._environment = dict(os.environ if environment is None else environment)
        self._children: dict[ProcessId, subprocess.Popen[bytes]] = {}
        self._boot = boot_id()

    async def start(self, spec: ProcessSpec) -> ProcessRecord:
        child, process = await asyncio.to_thread(self._spawn, spec)
        self._children[process] = child
        return spec.record(process=process, boot=self._boot, started_at=self._clock.now())

    async def find(self, record: ProcessRecord) -> ProcessRecord | None:
        if record.process is not None:
            return record if self.poll(record) is None else None
        process = await asyncio.to_thread(_process_with_argument, record.spec_file)
        if process is None:
            return None
        return msgspec.structs.replace(record, process=process, boot=self._boot)

    def poll(self, record: ProcessRecord) -> Exit | None:
        if record.process is None or record.boot != self._boot:
            return Exit(None)
        child = self._children.get(record.process)
        if child is None:
            return None if is_alive(record.process) else Exit(None)
        code = child.poll()
        return None if code is None else Exit(code)

    async def wait(self, record: ProcessRecord) -> Exit:
        while (exit_ := self.poll(record)) is None:
            assert record.process is not None
            await _ended(record.process)
        return exit_

    async def stop(self, record: ProcessRecord, *, grace_s: float) -> Exit:
        if (exit_ := self.poll(record)) is not None:
            return exit_
        self._signal(record, signal.SIGTERM)
        try:
            async with asyncio.timeout(grace_s):
                return await self.wait(record)
        except TimeoutError:
            self._signal(record, signal.SIGKILL)
            return await self.wait(record)

    async def logs(self, record: ProcessRecord, *, lines: int) -> list[str]:
        return await asyncio.to_thread(tail_of, Path(record.log_file), lines=lines)

    def _signal(self, record: ProcessRecord, number: signal.Signals) -> None:
        if record.process is not None and record.boot == self._boot:
            send_signal(record.process, number)

    def _spawn(self, spec: ProcessSpec) -> tuple[subprocess.Popen[bytes], ProcessId]:
        spec_file, log_file = Path(spec.spec_file), Path(spec.log_file)
        try:
            for directory in {spec_file.parent, log_file.parent}:
                directory.mkdir(parents=True, exist_ok=True)
            write_private(spec_file, spec.spec)
            with log_file.open("ab") as log:
                child = subprocess.Popen(
                    [sys.executable, "-m", spec.module, *spec.arguments, spec.spec_file],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    env=self._child_environment(spec),
                )
        except OSError as exc:
            raise StorageFailed(
                f"{spec.name} cannot be started: {exc}", hint="look at the disk of the home"
            ) from exc
        process = identify(child.pid)
        if process is None:
            code = child.wait()
            raise Unavailable(f"{spec.name} ended at once with {code}", hint=f"see {log_file}")
        return child, process

    def _child_environment(self, spec: ProcessSpec) -> dict[str, str]:
        threads = str(spec.threads)
        return {
            **self._environment,
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "OPENBLAS_NUM_THREADS": threads,
            "PYTHONUNBUFFERED": "1",
        }


def boot_id() -> str:
    """The kernel's name of this boot; empty where it has none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


async def _ended(process: ProcessId) -> None:
    """Returns when the process has ended (or, without pidfd, after a short while)."""
    if not hasattr(os, "pidfd_open"):
        await asyncio.sleep(_LOOK_INTERVAL_S)
        return
    try:
        descriptor = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(descriptor, ended.set)
    try:
        if is_alive(process):
            await ended.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


def _process_with_argument(argument: str) -> ProcessId | None:
    """The process started as `python -m … argument`; None where there is no /proc."""
    wanted = os.fsencode(argument)
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            arguments = entry.read_bytes().split(b"\0")
        except OSError:
            continue
        if wanted in arguments and b"-m" in arguments:
            return identify(int(entry.parent.name))
    return None
