"""Following one process: its end, and its status over long polls of its own socket."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

import msgspec

from homefire.foundation.process import ProcessId
from homefire.http.client import ServiceClient
from homefire.launch import Launcher, ProcessRecord
from homefire.wire.errors import HomefireError
from homefire.wire.internal import ReplicaStatus, TrainerStatus
from homefire.wire.specs import Upstream

_FIRST_PROBE_S = 0.02
_SLOWEST_PROBE_S = 0.5
_HOLD_S = 20.0
_REFRESH_S = 2.0
"""How long a user's status waits for a service that is too busy to answer."""

Connect = Callable[[Upstream], ServiceClient]


class StatusMessage(Protocol):
    """What the statuses of all services have in common."""

    @property
    def version(self) -> int: ...

    @property
    def nonce(self) -> str: ...


Status = TypeVar("Status", bound=StatusMessage)


class Watch(Generic[Status]):
    """Knows what a process last said and how it ended; calls `wake` when that matters.

    A process counts as ours only when it gave its nonce over its own socket. While the watch is not
    urgent it asks about once per `pace_s`, since a busy service changes its status all the time.
    """

    def __init__(
        self,
        record: ProcessRecord,
        *,
        kind: type[Status],
        significant: Callable[[Status], object],
        launcher: Launcher,
        connect: Connect,
        wake: Callable[[], None],
        pace_s: float,
    ) -> None:
        self.record = record
        self.status: Status | None = None
        self.ended: str | None = None
        self._kind = kind
        self._significant = significant
        self._launcher = launcher
        self._wake = wake
        self._pace_s = pace_s
        self._urgent = asyncio.Event()
        self._urgent.set()
        assert record.listen is not None
        self.client = connect(record.listen)
        self._end = asyncio.create_task(self._await_end())
        self._following = asyncio.create_task(self._follow())

    @property
    def process(self) -> ProcessId | None:
        return self.record.process

    def set_urgent(self, urgent: bool) -> None:
        if urgent:
            self._urgent.set()
        else:
            self._urgent.clear()

    def accept(self, status: Status) -> None:
        """Takes a status; also one that came with the answer to a request."""
        before = self.status
        if before is not None and status.version < before.version:
            return
        self.status = status
        if before is None or self._significant(before) != self._significant(status):
            self._wake()

    async def refresh(self) -> None:
        """Asks once, without waiting for a change; a service that does not answer keeps its last."""
        with contextlib.suppress(HomefireError, msgspec.DecodeError, TimeoutError):
            async with asyncio.timeout(_REFRESH_S):
                status = await self.client.get("/internal/status", self._kind)
                if status.nonce == self.record.nonce:
                    self.accept(status)

    def stop_following(self) -> None:
        """Asks no more, and waits for the end only: a held poll would delay the process's stop."""
        self._following.cancel()

    async def close(self) -> None:
        self._end.cancel()
        self._following.cancel()
        try:
            # Not one by one under a suppressed CancelledError: that would hide our own cancellation.
            await asyncio.gather(self._end, self._following, return_exceptions=True)
        finally:
            await self.client.close()

    async def _await_end(self) -> None:
        exit_ = await self._launcher.wait(self.record)
        self.ended = str(exit_)
        self._wake()

    async def _follow(self) -> None:
        probe_s = _FIRST_PROBE_S
        while self.ended is None:
            status = await self._ask()
            if status is None:
                # A socket that is not there yet, or not any more, has no event to wait for.
                await asyncio.sleep(probe_s)
                probe_s = min(_SLOWEST_PROBE_S, probe_s * 1.5)
                continue
            if status.nonce != self.record.nonce:
                self.ended = "does not answer: its socket belongs to another process"
                self._wake()
                return
            probe_s = _FIRST_PROBE_S
            self.accept(status)
            await self._pace()

    async def _ask(self) -> Status | None:
        query = {} if self.status is None else {"after": self.status.version, "wait_s": _HOLD_S}
        try:
            return await self.client.get("/internal/status", self._kind, **query)
        except (HomefireError, msgspec.DecodeError):
            return None

    async def _pace(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._pace_s):
                await self._urgent.wait()


def trainer_essence(status: TrainerStatus) -> object:
    """What a change of makes control look at the job again."""
    return (status.state, status.detail, status.error, status.engine_restarts)


def replica_essence(status: ReplicaStatus) -> object:
    """What a change of makes control look at the deployment again."""
    loading = (status.stage, status.target, status.error)
    return (status.ready, status.identity, status.digest, loading)
