"""The control plane put together: what it is made of, how it starts, how it stops."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from homefire.checkpoints import CheckpointKey, open_store
from homefire.control.capacity import Capacity
from homefire.control.catalog import Catalog, read_aliases
from homefire.control.checkpoint_deletion import CheckpointDeletion
from homefire.control.db import tables
from homefire.control.db.database import Database
from homefire.control.db.rows import DeploymentRow, JobRow, ReplicaRow
from homefire.control.deployments import Deployments, find_deployment
from homefire.control.download_links import DownloadLinks
from homefire.control.holding import Holder
from homefire.control.hot_loads import HotLoads, is_settled
from homefire.control.job_activity import Activities
from homefire.control.jobs import Jobs
from homefire.control.lifecycle import (
    DEPLOYMENT_IN_TRANSITION,
    JOB_IN_TRANSITION,
    SeenReplica,
)
from homefire.control.models import Models
from homefire.control.observations import Observations
from homefire.control.process_keeper import KeeperConfig, ProcessKeeper
from homefire.control.processes import ProcessPlan
from homefire.control.promotions import Promotions
from homefire.control.reconcile import Reconciler
from homefire.control.replica_keeper import ReplicaKeeper
from homefire.control.retention import Retention
from homefire.control.routing import route_table
from homefire.control.run_records import RunRecords
from homefire.control.status import status_report
from homefire.control.tinker.management import Management
from homefire.control.tinker.plane import TinkerPlane
from homefire.control.trainer_keeper import TrainerKeeper
from homefire.control.watch import Connect
from homefire.control.world import Picture, World
from homefire.foundation.clock import Clock, SystemClock
from homefire.foundation.durable import write_private
from homefire.foundation.home import Home
from homefire.foundation.versioned import Versioned
from homefire.http.client import ServiceClient
from homefire.launch import Launcher
from homefire.wire.ids import DEFAULT_ACCOUNT
from homefire.wire.internal import RouteTable
from homefire.wire.records import StatusReport
from homefire.wire.resources import JobState
from homefire.wire.specs import ControlSpec


@dataclass(frozen=True)
class ControlConfig:
    """How patient the control plane is."""

    hold_s: float = 20.0
    """Longest hold of a request about something in transition; the clients give up at 30 s."""
    keeper: KeeperConfig = field(default_factory=KeeperConfig)


@dataclass(frozen=True)
class DeploymentView:
    """A deployment, its replicas, and what is observed of them."""

    row: DeploymentRow
    replicas: list[ReplicaRow]
    seen: Mapping[int, SeenReplica]

    @property
    def num_ready(self) -> int:
        return sum(1 for view in self.seen.values() if view.status and view.status.ready)


class ControlPlane:
    """All parts, wired. `start` and `stop` once each; the parts are used by the routes."""

    def __init__(
        self,
        spec: ControlSpec,
        *,
        launcher: Launcher,
        clock: Clock | None = None,
        connect: Connect = ServiceClient,
        config: ControlConfig | None = None,
    ) -> None:
        self.spec = spec
        self.clock = clock or SystemClock()
        self.config = config or ControlConfig()
        self.home = Home(Path(spec.home))
        self.home.prepare()
        self.capacity = Capacity.of_machine(
            threads=spec.capacity_threads, memory_bytes=spec.capacity_memory_bytes
        )
        self.database = Database(self.home.database)
        self.store = open_store(self.home.store_root, self.clock)
        self.catalog = Catalog(
            account=DEFAULT_ACCOUNT,
            models=self.home.models,
            roots=[Path(root) for root in spec.model_roots],
            aliases={**read_aliases(self.home.root), **spec.aliases},
        )
        # Random, so that a gateway never takes this plane's table for its predecessor's.
        version = secrets.randbits(48)
        self.routes: Versioned[RouteTable] = Versioned(RouteTable(version=version), version=version)
        self._build(launcher, connect)
        self._loop: asyncio.Task[None] | None = None
        self._pruning: list[asyncio.Task[None]] = []
        self.stopping = False

    def _build(self, launcher: Launcher, connect: Connect) -> None:
        woken = asyncio.Event()
        self.observations = Observations(
            launcher=launcher,
            connect=connect,
            wake=woken.set,
            pace_s=self.config.keeper.status_pace_s,
        )
        processes = ProcessKeeper(
            launcher=launcher, clock=self.clock, config=self.config.keeper, wake=woken.set
        )
        plan = ProcessPlan(
            self.home,
            self.spec.engine,
            self.spec.model_roots,
            keep_journals=self.spec.keep_journals,
            held_graph_bytes=self.spec.held_graph_bytes,
            accelerator=self.spec.accelerator,
        )
        self.reconciler = Reconciler(
            database=self.database,
            observations=self.observations,
            processes=processes,
            trainers=TrainerKeeper(
                database=self.database,
                keeper=processes,
                observations=self.observations,
                plan=plan,
                capacity=self.capacity,
                clock=self.clock,
            ),
            replicas=ReplicaKeeper(
                database=self.database,
                keeper=processes,
                observations=self.observations,
                plan=plan,
                capacity=self.capacity,
                clock=self.clock,
            ),
            clock=self.clock,
            publish=self._publish,
            tend=self._tend,
            woken=woken,
        )
        self.holder = Holder(self.reconciler.passes, hold_s=self.config.hold_s)
        self.jobs = Jobs(
            self.database,
            self.catalog,
            self.reconciler,
            self.capacity,
            self.clock,
            DEFAULT_ACCOUNT,
        )
        self.deployments = Deployments(
            self.database, self.catalog, self.reconciler, self.capacity, self.clock
        )
        going = set[CheckpointKey]()
        self.hot_loads = HotLoads(
            self.database, self.store, self.reconciler, self.clock, self.home, going
        )
        self.models = Models(self.database, self.catalog, DEFAULT_ACCOUNT, self.spec.accelerator)
        self.activities = Activities(self.home)
        self.deletion = CheckpointDeletion(
            self.database, self.store, self.activities, self.observations, self.clock
        )
        self.management = Management.of(
            database=self.database,
            store=self.store,
            deletion=self.deletion,
            activities=self.activities,
            links=DownloadLinks(
                url=self.spec.public_url, key=self.home.download_key(), clock=self.clock
            ),
            clock=self.clock,
        )
        self.records = RunRecords(self.database, self.store, self.home, self.clock, self.deletion)
        self.retention = Retention(
            self.database,
            self.store,
            self.home.store_root,
            self.deletion,
            launcher,
            self.home,
            self.clock,
            tombstone_s=self.spec.tombstone_retention_s,
            going=going,
        )
        self.tinker = TinkerPlane(
            database=self.database,
            store=self.store,
            catalog=self.catalog,
            models=self.models,
            observations=self.observations,
            reconciler=self.reconciler,
            capacity=self.capacity,
            clock=self.clock,
            pool_idle_s=self.spec.pool_idle_s,
        )
        self.promotions = Promotions(
            database=self.database,
            store=self.store,
            catalog=self.catalog,
            launcher=launcher,
            home=self.home,
            clock=self.clock,
        )

    async def start(self) -> None:
        """Opens the database, registers the home's key, adopts what runs, and begins to reconcile.

        Raises HomeTooNew, HomeBusy or StorageFailed.
        """
        await self.database.open()
        key = hashlib.sha256(self.home.api_key().encode()).hexdigest()
        now = self.clock.now()
        await self.database.transact(lambda c: tables.register_key(c, key, DEFAULT_ACCOUNT, now))
        await self.reconciler.adopt()
        await self.promotions.resume()
        self._loop = asyncio.create_task(self.reconciler.run())
        self._pruning = [
            asyncio.create_task(self.deletion.prune_for_ever()),
            asyncio.create_task(self.retention.apply_for_ever()),
        ]

    async def stop_processes(self) -> None:
        """A clean stop: every process ends, every row stays, so that the next start resumes them.

        Held requests are answered first; new ones are still answered, and hold no more.
        """
        if self.stopping:
            return
        self.stopping = True
        self.holder.release()
        self.reconciler.end()
        if self._loop is not None:
            await self._loop
        await self.promotions.stop()
        await self.reconciler.stop_all()
        await self._publish(await self.reconciler.look())
        self._set_routes(self.routes.get())

    async def close(self) -> None:
        """Lets go of everything; what was not stopped runs on, as it does when control is killed."""
        await self.stop_reconciling()
        await self._stop_pruning()
        await self.promotions.close()
        await self.observations.close()
        await self.database.close()

    async def has_looked(self, *, within_s: float) -> bool:
        """Whether the routing table is that of the rows yet: from the first pass on."""
        passes = self.reconciler.passes
        if not passes.get():
            await passes.wait_beyond(after=passes.version, timeout_s=within_s)
        return passes.get() > 0

    async def held_job(self, account: str, job_id: str) -> JobRow:
        """The job; while it is in transition the answer waits."""
        return await self.holder.hold(
            lambda: self.jobs.get(account, job_id),
            settled=lambda job: job.state not in JOB_IN_TRANSITION and not _is_draining(job),
        )

    async def held_deployment(self, account: str, deployment_id: str) -> DeploymentView:
        return await self.holder.hold(
            lambda: self.deployment_view(account, deployment_id),
            settled=lambda view: view.row.state not in DEPLOYMENT_IN_TRANSITION,
        )

    async def held_hot_load(self, account: str, deployment_name: str) -> DeploymentView:
        deployment = await self.hot_loads.deployment(account, deployment_name)
        return await self.holder.hold(
            lambda: self.deployment_view(account, deployment.id),
            settled=lambda view: is_settled(view.row, view.seen),
        )

    async def until_routed(self, account: str, resource: str) -> None:
        """Returns when the gateway's table knows a new job or deployment: its client goes there next."""

        async def is_routed() -> bool:
            table = self.routes.get()
            key = f"{account}/{resource}"
            return key in table.trainers or key in table.deployments

        await self.holder.hold(is_routed, settled=bool)

    async def until_route_is_current(self, account: str, resource: str) -> None:
        """Returns when the gateway's table has a root job or sampler in the state of its row."""
        key = f"{account}/{resource}"

        async def is_current() -> bool:
            table = self.routes.get()
            route = table.trainers.get(key) or table.deployments.get(key)
            state = await self.database.transact(lambda c: _state_of(c, resource))
            return route is not None and route.state == state

        await self.holder.hold(is_current, settled=bool)

    async def deployment_view(self, account: str, deployment_id: str) -> DeploymentView:
        row, replicas = await self.database.transact(
            lambda c: (find_deployment(c, account, deployment_id), tables.replicas(c))
        )
        own = [replica for replica in replicas if replica.deployment == row.id]
        seen = {r.number: self.observations.replica(row, r.number) for r in own}
        return DeploymentView(row, own, seen)

    async def status(self, account: str) -> StatusReport:
        await self.observations.refresh()
        return status_report(
            await self.reconciler.look(),
            runs=await self.tinker.sessions.open_runs(account),
            account=account,
            capacity=self.capacity,
            home=str(self.home.root),
            url=self.spec.public_url,
        )

    async def stop_reconciling(self) -> None:
        """Ends the loop; what runs goes on, and nothing is started or stopped any more."""
        if self._loop is not None:
            self._loop.cancel()
            await asyncio.gather(self._loop, return_exceptions=True)

    async def _stop_pruning(self) -> None:
        for task in self._pruning:
            task.cancel()
        await asyncio.gather(*self._pruning, return_exceptions=True)

    async def _tend(self, world: World) -> tuple[bool, float | None]:
        return await self.tinker.tend(world)

    async def _publish(self, picture: Picture) -> None:
        """Gives the gateway a new table when it differs, in memory and, for its restarts, on disk."""
        current = self.routes.get()
        table = route_table(
            version=current.version,
            keys=picture.world.keys,
            jobs=picture.world.jobs,
            deployments=picture.world.deployments,
            replicas=picture.world.replicas,
            trainers_seen=picture.trainers,
            replicas_seen=picture.replicas,
        )
        if table != current:
            published = self._set_routes(table)
            content = msgspec.json.encode(published)
            await asyncio.to_thread(write_private, self.home.routes_file, content)

    def _set_routes(self, table: RouteTable) -> RouteTable:
        versioned = msgspec.structs.replace(table, version=self.routes.version + 1)
        self.routes.set(versioned)
        return versioned


def _state_of(connection: sqlite3.Connection, resource: str) -> str | None:
    row = tables.job(connection, resource) or tables.deployment(connection, resource)
    return None if row is None else row.state.value


def _is_draining(job: JobRow) -> bool:
    """It is paused, and its trainer still writes its recovery point."""
    return job.state is JobState.PAUSED and job.supervision.process is not None
