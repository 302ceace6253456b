"""The loop that makes what is into what is wanted.

Level-triggered: every pass looks at all rows and at all that is observed, and does what `lifecycle`
decides. It sleeps until something wakes it (a request changed a row, a process said something new
or ended) or a back-off is over. No network call is made inside a transaction.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable

from homefire.control.db.database import Database
from homefire.control.lifecycle import WaitUntil, decide_deployment, decide_job
from homefire.control.observations import Observations
from homefire.control.process_keeper import ProcessKeeper
from homefire.control.replica_keeper import ReplicaKeeper
from homefire.control.trainer_keeper import TrainerKeeper
from homefire.control.world import Picture, World, read_world
from homefire.foundation.clock import Clock
from homefire.foundation.versioned import Versioned

log = logging.getLogger(__name__)
_AFTER_FAILURE_S = 1.0

Publish = Callable[[Picture], Awaitable[None]]
Tend = Callable[[World], Awaitable[tuple[bool, float | None]]]
"""Whether rows changed, and when to be called again though nothing happens."""


class Reconciler:
    """One per control plane. `wake` may be called at any time; everything else is its own."""

    def __init__(
        self,
        *,
        database: Database,
        observations: Observations,
        processes: ProcessKeeper,
        trainers: TrainerKeeper,
        replicas: ReplicaKeeper,
        clock: Clock,
        publish: Publish,
        tend: Tend,
        woken: asyncio.Event,
    ) -> None:
        self._database = database
        self._observations = observations
        self._processes = processes
        self._trainers = trainers
        self._replicas = replicas
        self._clock = clock
        self._publish = publish
        self._tend = tend
        self._woken = woken
        self._ending = False
        self.passes: Versioned[int] = Versioned(0)
        """Counts passes; held requests look again after each."""

    def wake(self) -> None:
        self._woken.set()

    def end(self) -> None:
        """No further pass. Not by cancelling: a process might be started and not written down."""
        self._ending = True
        self.wake()

    async def run(self) -> None:
        """Runs until `end` is called, and then finishes its pass; or until cancelled."""
        while not self._ending:
            self._woken.clear()
            try:
                due = await self.reconcile()
            except Exception:  # the worker loop: one bad pass must not end them all
                # A full disk, for one; what was not done is decided again.
                log.exception("a pass failed")
                due = self._clock.now() + _AFTER_FAILURE_S
            if not self._ending:
                await self._sleep(until=due)

    async def adopt(self) -> None:
        """Finds the processes that a killed control plane started and did not write down any more.

        Once, before the first pass. What is written down needs nothing: its watch proves it.
        """
        world = await self._database.transact(read_world)
        for job in world.jobs:
            await self._trainers.adopt(job)
        for replica in world.replicas:
            await self._replicas.adopt(replica)

    async def reconcile(self) -> float | None:
        """One pass. Returns when to look again though nothing happened; None: not before."""
        await self._follow()
        picture = await self.look()
        acted, act_at = await self._act(picture)
        tended, tend_at = await self._tend(picture.world)
        changed = acted or tended
        await self._publish(await self.look() if changed else picture)
        self.passes.set(self.passes.get() + 1)
        if changed:
            self.wake()
        return min((at for at in (act_at, tend_at) if at is not None), default=None)

    async def stop_all(self) -> None:
        """A clean stop: every process ends, every row stays as the next start resumes it."""
        await self._observations.close()
        world = await self._database.transact(read_world)
        await asyncio.gather(
            *(self._trainers.stop(job) for job in world.jobs),
            *(self._replicas.stop(replica) for replica in world.replicas),
            self._processes.all_stopped(),
        )

    async def look(self) -> Picture:
        """All rows and all that is observed, now."""
        world = await self._database.transact(read_world)
        deployments = {row.id: row for row in world.deployments}
        return Picture(
            world,
            {job.id: self._observations.trainer(job) for job in world.jobs},
            {
                (r.deployment, r.number): self._observations.replica(
                    deployments[r.deployment], r.number
                )
                for r in world.replicas
            },
        )

    async def _follow(self) -> None:
        world = await self._database.transact(read_world)
        await self._observations.follow(world.jobs, world.replicas)

    async def _act(self, picture: Picture) -> tuple[bool, float | None]:
        """Does what is decided. Says whether anything changed, and when the next thing is due."""
        now, changed, due = self._clock.now(), False, list[float]()
        for job in picture.world.jobs:
            action = decide_job(job, picture.trainers[job.id], now=now)
            if isinstance(action, WaitUntil):
                due.append(action.at)
            elif action is not None:
                changed |= await self._trainers.act(job, action)
        for deployment in picture.world.deployments:
            replicas = {row.number: row for row in picture.world.replicas_of(deployment)}
            seen = {number: picture.replicas[deployment.id, number] for number in replicas}
            for action in decide_deployment(deployment, [*replicas.values()], seen, now=now):
                if isinstance(action, WaitUntil):
                    due.append(action.at)
                else:
                    changed |= await self._replicas.act(deployment, replicas, action)
        return changed, min(due, default=None)

    async def _sleep(self, *, until: float | None) -> None:
        timeout = None if until is None else max(0.0, until - self._clock.now())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._woken.wait()
