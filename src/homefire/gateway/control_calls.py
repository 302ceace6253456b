"""What the gateway itself asks control about the root plane: where a run is, and to wake things."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import TypeVar
from urllib.parse import quote

from homefire.foundation.clock import Clock
from homefire.gateway.route_feed import RouteFeed
from homefire.gateway.routing import Holds
from homefire.http.client import ServiceClient
from homefire.wire.checkpoint_paths import CheckpointPath
from homefire.wire.errors import HomefireError, Unavailable
from homefire.wire.internal import NewRun, RunPlace, SamplerPlace, SnapshotRef, Wake
from homefire.wire.pooled import session_of

log = logging.getLogger(__name__)
REMEMBERED_RUNS = 10_000
_TIMEOUT_S = 30.0
Answer = TypeVar("Answer")


class ControlCalls:
    """Asks again while control is restarting, for as long as a request may be held.

    The job of a run never changes, so it is asked once: with control down, known runs go on.
    """

    def __init__(
        self, feed: RouteFeed, clock: Clock, holds: Holds, *, remembered: int = REMEMBERED_RUNS
    ) -> None:
        self._feed = feed
        self._remembered = remembered
        self._clock = clock
        self._holds = holds
        self._client = ServiceClient(feed.control, timeout_s=_TIMEOUT_S)
        self._jobs: OrderedDict[tuple[str, str], str] = OrderedDict()
        """Job by account and run, the least recently used first."""
        self._samplers: OrderedDict[tuple[str, str], str] = OrderedDict()
        """The same for the sampler of a run's snapshots."""
        self._waking: dict[tuple[str, str, str], asyncio.Task[None]] = {}

    async def place(self, new: NewRun) -> RunPlace:
        """Which job trains a new run; control finds, makes or wakes it."""
        place = await self._ask(lambda: self._client.post("/internal/tinker/runs", new, RunPlace))
        self._remember(new.account, place)
        return place

    async def job_of(self, account: str, run: str) -> str:
        """NotFound, FailedPrecondition for a finished session, Unavailable."""
        known = self._jobs.get((account, run))
        if known is not None:
            self._jobs.move_to_end((account, run))
            return known
        path = f"/internal/tinker/runs/{quote(run, safe=':')}"
        place = await self._ask(lambda: self._client.get(path, RunPlace, account=account))
        self._remember(account, place)
        return place.job

    async def sampler_of(self, account: str, path: CheckpointPath) -> str:
        """The deployment that serves a snapshot, as it serves all of the run. UnknownSnapshot,
        Unsupported for those of a dedicated job, Unavailable."""
        key = (account, path.run)
        if key not in self._samplers:
            asked = SnapshotRef(account, str(path))
            place = await self._ask(
                lambda: self._client.post("/internal/tinker/samplers", asked, SamplerPlace)
            )
            self._samplers[key] = place.sampler
        self._samplers.move_to_end(key)
        if len(self._samplers) > self._remembered:
            self._samplers.popitem(last=False)
        return self._samplers[key]

    def forget_session(self, account: str, session: str) -> None:
        """Its runs have to be asked for again: control refuses those of a finished session."""
        for key in [k for k in self._jobs if k[0] == account and session_of(k[1]) == session]:
            del self._jobs[key]

    async def wake(self, account: str, service: str) -> None:
        """Starts a root job or sampler that is parked. Requests that come meanwhile share the call.

        NotFound for a sampler of nothing. With control down it does nothing: the next poll asks again.
        """
        try:
            await asyncio.shield(self.wake_soon(account, service))
        except Unavailable as exc:
            log.debug("%s could not be woken: %s", service, exc)

    async def wake_deployment(self, account: str, deployment: str) -> None:
        """Starts one that was scaled to zero; else as `wake`."""
        try:
            await asyncio.shield(self._wake_once("/internal/deployments/wake", account, deployment))
        except Unavailable as exc:
            log.debug("%s could not be woken: %s", deployment, exc)

    def wake_soon(self, account: str, service: str) -> asyncio.Task[None]:
        return self._wake_once("/internal/tinker/wake", account, service)

    def _wake_once(self, path: str, account: str, service: str) -> asyncio.Task[None]:
        key = (path, account, service)
        task = self._waking.get(key)
        if task is None:
            task = asyncio.create_task(self._wake(path, account, service))
            self._waking[key] = task
            task.add_done_callback(lambda done: self._woken(key, done))
        return task

    async def close(self) -> None:
        for task in self._waking.values():
            task.cancel()
        await asyncio.gather(*self._waking.values(), return_exceptions=True)
        await self._client.close()

    async def _wake(self, path: str, account: str, service: str) -> None:
        await self._client.post(path, Wake(account, service), dict[str, object])

    def _woken(self, key: tuple[str, str, str], task: asyncio.Task[None]) -> None:
        del self._waking[key]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.info("%s was not woken: %s", key[-1], error)

    async def _ask(self, call: Callable[[], Awaitable[Answer]]) -> Answer:
        deadline = self._clock.monotonic() + self._holds.request_s
        while True:
            try:
                return await call()
            except Unavailable as error:
                left_s = deadline - self._clock.monotonic()
                if left_s <= 0:
                    raise _said_by_control(error) from error
            await self._feed.change(
                after=self._feed.version, timeout_s=min(left_s, self._holds.look_again_s)
            )

    def _remember(self, account: str, place: RunPlace) -> None:
        self._jobs[account, place.run] = place.job
        self._jobs.move_to_end((account, place.run))
        if len(self._jobs) > self._remembered:
            self._jobs.popitem(last=False)


def _said_by_control(error: HomefireError) -> Unavailable:
    hint = error.hint or "models that exist go on; retry in a second"
    return Unavailable(error.message, hint=hint)
