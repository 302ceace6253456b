"""Does what is decided about deployments, their replicas and the weights that those serve."""

from __future__ import annotations

import asyncio
import logging
import sqlite3

from homefire.control.capacity import Capacity
from homefire.control.db import tables
from homefire.control.db.database import Database
from homefire.control.db.rows import DeploymentRow, DesiredWeights, ReplicaRow, Supervision
from homefire.control.lifecycle import (
    AdmitReplica,
    AdvanceDeployment,
    Bury,
    DeploymentAction,
    Dismiss,
    Launch,
    MarkCaughtUp,
    MarkReady,
    OnReplica,
    RemoveReplica,
    SignalHotLoad,
    Stop,
    WaitUntil,
    deployment_after,
)
from homefire.control.observations import Observations
from homefire.control.process_keeper import Change, ProcessKeeper
from homefire.control.processes import ProcessPlan
from homefire.control.supervision import after_catching_up, after_clean_stop, after_ready
from homefire.control.world import ledger_of
from homefire.foundation.clock import Clock
from homefire.wire.errors import HomefireError, UserError
from homefire.wire.internal import HotLoadRequest, ReplicaStatus
from homefire.wire.resources import DeploymentState

log = logging.getLogger(__name__)
_SIGNAL_AGAIN_S = 0.5
_SIGNAL_TIMEOUT_S = 5.0


class ReplicaKeeper:
    """Owned by the reconciler."""

    def __init__(
        self,
        *,
        database: Database,
        keeper: ProcessKeeper,
        observations: Observations,
        plan: ProcessPlan,
        capacity: Capacity,
        clock: Clock,
    ) -> None:
        self._database = database
        self._keeper = keeper
        self._observations = observations
        self._plan = plan
        self._capacity = capacity
        self._clock = clock

    async def act(
        self, deployment: DeploymentRow, replicas: dict[int, ReplicaRow], action: DeploymentAction
    ) -> bool:
        """Says whether anything changed, so that it has to be decided again."""
        match action:
            case AdvanceDeployment():
                return await self._advance(deployment, action)
            case AdmitReplica(number):
                return await self._admit(deployment, number)
            case OnReplica(number, process_action):
                return await self._act_on_process(deployment, replicas[number], process_action)
            case Dismiss(number):
                await self._database.transact(lambda c: tables.leave_replica(c, replicas[number]))
            case RemoveReplica(number):
                await self._database.transact(lambda c: tables.remove_replica(c, replicas[number]))
            case SignalHotLoad(number):
                await self._signal_hot_load(deployment, number)
            case MarkCaughtUp(number):
                await self._write(replicas[number], after_catching_up)
            case WaitUntil():
                return False
        return True

    async def adopt(self, replica: ReplicaRow) -> None:
        """After a control plane that was killed; see `ProcessKeeper.adopt`."""
        change = await self._keeper.adopt(replica.supervision)
        if change is not None:
            await self._write(replica, change)

    async def stop(self, replica: ReplicaRow) -> None:
        """A clean stop: the row stays as it is, without a process."""
        if replica.supervision.process is not None:
            await self._keeper.stop(replica.supervision.process)
            await self._write(replica, lambda _: after_clean_stop())

    async def _advance(self, deployment: DeploymentRow, action: AdvanceDeployment) -> bool:
        to, now = deployment_after(deployment, action.event), self._clock.now()

        def work(connection: sqlite3.Connection) -> bool:
            moved = tables.advance_deployment(
                connection, deployment, to, message=action.message, now=now
            )
            if moved and to is DeploymentState.DELETED and deployment.purge:
                tables.remove_deployment(connection, deployment.id)
            return moved

        log.info("deployment %s: %s -> %s %s", deployment.id, deployment.state, to, action.message)
        return await self._database.transact(work)

    async def _admit(self, deployment: DeploymentRow, number: int) -> bool:
        now = self._clock.now()

        def work(connection: sqlite3.Connection) -> bool:
            reason = ledger_of(connection, self._capacity).shortfall(deployment.config.need)
            if reason is None:
                row = ReplicaRow(deployment=deployment.id, number=number, supervision=Supervision())
                tables.insert_replica(connection, row)
            message = reason or ""
            noted = message != deployment.message and tables.note_deployment(
                connection, deployment, message, now=now
            )
            return noted or reason is None

        return await self._database.transact(work)

    async def _act_on_process(
        self,
        deployment: DeploymentRow,
        replica: ReplicaRow,
        action: Launch | Stop | Bury | MarkReady,
    ) -> bool:
        match action:
            case Launch():
                await self._launch(deployment, replica)
            case Stop():
                self._observations.expect_end_of_replica((replica.deployment, replica.number))
                self._keeper.stop_in_background(replica.supervision)
                return False
            case Bury(failure):
                await self._write(replica, await self._keeper.bury(replica.supervision, failure))
            case MarkReady():
                now = self._clock.now()
                await self._write(replica, lambda supervision: after_ready(supervision, now=now))
        return True

    async def _launch(self, deployment: DeploymentRow, replica: ReplicaRow) -> None:
        spec = self._plan.replica(deployment, replica)
        intend = self._keeper.intend(spec)
        key = (replica.deployment, replica.number)

        def intend_unless_moved(connection: sqlite3.Connection) -> bool:
            fresh = tables.replica(connection, *key)
            if fresh is None or fresh.leaving or fresh.supervision.process:
                return False
            tables.supervise_replica(connection, *key, intend(fresh.supervision))
            return True

        if await self._database.transact(intend_unless_moved):
            await self._write(replica, await self._keeper.start(spec))

    async def _signal_hot_load(self, deployment: DeploymentRow, number: int) -> None:
        """Tells the replica; whether it then loads is seen in its status."""
        watched = self._observations.replica_watch((deployment.id, number))
        if watched is None:
            return
        watch, signals = watched
        at_version = watch.status.version if watch.status else 0
        refusal: str | None = None
        try:
            async with asyncio.timeout(_SIGNAL_TIMEOUT_S):
                answer = await watch.client.post(
                    "/internal/hot_load", _hot_load_request(deployment.desired), ReplicaStatus
                )
            watch.accept(answer)
        except UserError as exc:
            refusal = str(exc)
        except (HomefireError, TimeoutError) as exc:
            signals.not_before = self._clock.now() + _SIGNAL_AGAIN_S
            log.warning("replica %s/%d was not told: %s", deployment.id, number, exc)
            return
        signals.generation, signals.at_version = deployment.desired.generation, at_version
        signals.refusal = refusal

    async def _write(self, replica: ReplicaRow, change: Change) -> None:
        key = (replica.deployment, replica.number)

        def work(connection: sqlite3.Connection) -> None:
            fresh = tables.replica(connection, *key)
            if fresh is not None:
                tables.supervise_replica(connection, *key, change(fresh.supervision))

        await self._database.transact(work)


def _hot_load_request(desired: DesiredWeights) -> HotLoadRequest:
    return HotLoadRequest(
        identity=desired.identity,
        location=desired.location,
        digest=desired.digest,
        reset_prompt_cache=desired.reset_prompt_cache,
        transition=desired.transition,
        drain=desired.drain,
        drain_timeout_s=desired.drain_timeout_s,
    )
