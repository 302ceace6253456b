"""The root Tinker plane put together."""

from __future__ import annotations

import sqlite3

from homefire.checkpoints import CheckpointStore
from homefire.control.capacity import Capacity
from homefire.control.catalog import Catalog
from homefire.control.db import tables
from homefire.control.db.database import Database
from homefire.control.models import Models
from homefire.control.observations import Observations
from homefire.control.reconcile import Reconciler
from homefire.control.tinker.base_models import BaseModels
from homefire.control.tinker.closing import Closing
from homefire.control.tinker.parking import Parking
from homefire.control.tinker.root_jobs import RootJobs
from homefire.control.tinker.runs import Runs
from homefire.control.tinker.samplers import Samplers
from homefire.control.tinker.sessions import Sessions
from homefire.control.world import World
from homefire.foundation.clock import Clock
from homefire.wire.errors import NotFound
from homefire.wire.internal import Wake
from homefire.wire.pooled import is_sampler


class TinkerPlane:
    """Its parts are used by the routes; `tend` by the reconciler, after every pass."""

    def __init__(
        self,
        *,
        database: Database,
        store: CheckpointStore,
        catalog: Catalog,
        models: Models,
        observations: Observations,
        reconciler: Reconciler,
        capacity: Capacity,
        clock: Clock,
        pool_idle_s: float,
    ) -> None:
        self._database = database
        self._reconciler = reconciler
        self._clock = clock
        self.sessions = Sessions(database, clock)
        self.base_models = BaseModels(database, catalog, models)
        self._jobs = RootJobs(capacity)
        self.runs = Runs(database, store, self.base_models, self._jobs, reconciler, clock)
        self.samplers = Samplers(database, store, self.base_models, reconciler, capacity, clock)
        self._closing = Closing(database=database, observations=observations, clock=clock)
        self._parking = Parking(
            database=database,
            observations=observations,
            sessions=self.sessions,
            clock=clock,
            idle_s=pool_idle_s,
        )

    async def wake(self, wake: Wake) -> None:
        """Starts what is parked; anything else is left alone. NotFound."""
        if is_sampler(wake.service):
            await self.samplers.wake(wake.account, wake.service)
            return
        if await self._database.transact(lambda c: self._wake_job(c, wake)):
            self._reconciler.wake()

    async def tend(self, world: World) -> tuple[bool, float | None]:
        """Lets go of what is not needed any more. Says whether rows changed, and when to look again."""
        closing_at = await self._closing.close_finished()
        parked, parking_at = await self._parking.park_idle(world)
        due = [at for at in (closing_at, parking_at) if at is not None]
        return parked, min(due, default=None)

    def _wake_job(self, connection: sqlite3.Connection, wake: Wake) -> bool:
        job = tables.job(connection, wake.service)
        if job is None or job.account != wake.account:
            raise NotFound(f"no trainer job {wake.service!r} in account {wake.account!r}")
        return self._jobs.wake(connection, job, now=self._clock.now())
