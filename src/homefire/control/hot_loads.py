"""Which weights a deployment has to serve, and which its replicas serve.

The store decides whether a snapshot exists, the row says which one is wanted, and only what a
replica itself reports counts as served.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from homefire.checkpoints import CheckpointKey, CheckpointStore
from homefire.control.db import tables
from homefire.control.db.database import Database
from homefire.control.db.rows import DeploymentRow, DesiredWeights, JobRow
from homefire.control.deployments import find_deployment
from homefire.control.lifecycle import (
    DEPLOYMENT_LIVE,
    SeenReplica,
    has_settled_weights,
    hot_load_error,
)
from homefire.control.names import id_in
from homefire.control.reconcile import Reconciler
from homefire.foundation.clock import Clock
from homefire.foundation.events import read_events
from homefire.foundation.home import Home
from homefire.wire.errors import (
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    UnknownDeployment,
    UnknownSnapshot,
    WrongCheckpointKind,
)
from homefire.wire.ids import BASE_IDENTITY, POLICY_SLOT, check_name
from homefire.wire.internal import (
    CanaryVerdict,
    Drain,
    HotLoadStage,
    LedgerEntry,
    SnapshotLocation,
    Transition,
)
from homefire.wire.manifest import CheckpointFamily
from homefire.wire.resources import (
    HotLoadSignal,
    HotLoadStatus,
    LoadedReplica,
    LoadingState,
    ServedState,
)

_PROMPT_CACHE_MODES = {"all", "new_session", "none"}
_MAX_DRAIN_S = 3600.0


@dataclass(frozen=True)
class HotLoads:
    database: Database
    store: CheckpointStore
    reconciler: Reconciler
    clock: Clock
    home: Home
    going: Collection[CheckpointKey] = ()
    """What is being pruned right now."""

    async def signal(
        self, account: str, deployment_name: str, signal: HotLoadSignal
    ) -> DeploymentRow:
        """Makes the snapshot the deployment's desired weights, if it is in the store.

        UnknownSnapshot names what exists; the replicas then serve on as they did.
        """
        reset = _reset_prompt_cache(signal.reset_prompt_cache)
        check_drain_timeout(signal.drain_timeout_s, field="drain_timeout_s")
        deployment = await self.deployment(account, deployment_name)
        if not deployment.config.enable_hot_load:
            raise FailedPrecondition(
                f"deployment {deployment.id!r} was created with enableHotLoad false",
                hint="PATCH enableHotLoad first",
            )
        identity = None if signal.identity == BASE_IDENTITY else signal.identity
        location, digest = None, ""
        if identity is not None:
            check_name(identity, field="identity")
            location, digest = await self._find(deployment, identity)

        def work(connection: sqlite3.Connection) -> None:
            if location is not None and _sampler(location, str(identity)) in self.going:
                raise UnknownSnapshot(
                    f"snapshot {identity!r} is being pruned",
                    hint="hot-load another, and pin what is to stay",
                )
            row = find_deployment(connection, account, deployment.id)
            transition = _transition(row.config.hot_load_transition_type)
            _refuse_strict_async(signal, transition)
            desired = DesiredWeights(
                identity=identity,
                location=location,
                digest=digest,
                reset_prompt_cache=reset,
                transition=transition,
                drain=signal.drain,
                drain_timeout_s=signal.drain_timeout_s,
                generation=row.desired.generation + 1,
            )
            tables.desire_weights(connection, row, desired, now=self.clock.now())

        await self.database.transact(work)
        self.reconciler.wake()
        return deployment

    async def deployment(self, account: str, deployment_name: str) -> DeploymentRow:
        """UnknownDeployment (400): clients wait for a long time on a 404 here."""
        if not deployment_name:
            raise InvalidArgument(
                "the header fireworks-deployment is missing",
                hint="send accounts/<account>/deployments/<deployment>",
                field="fireworks-deployment",
            )
        try:
            deployment_id = id_in(
                deployment_name,
                collection="deployments",
                account=account,
                field="fireworks-deployment",
            )
            row = await self.database.transact(lambda c: find_deployment(c, account, deployment_id))
        except NotFound as exc:
            rows = await self.database.transact(tables.deployments)
            names = ", ".join(r.id for r in rows if r.account == account) or "none"
            raise UnknownDeployment(exc.message, hint=f"deployments: {names}") from exc
        return row

    async def ledger(self, deployment: DeploymentRow) -> list[LedgerEntry]:
        """Every hot load that a replica confirmed or failed, oldest first."""
        root = self.home.replica(deployment.id, 0).parent
        entries = await asyncio.to_thread(_read_ledger, root)
        since = max(deployment.ledger_since, deployment.created_at)
        return [entry for entry in entries if entry.at >= since]

    async def _find(self, deployment: DeploymentRow, identity: str) -> tuple[SnapshotLocation, str]:
        """Where the snapshot is, and the digest of its weights."""
        job = await self._trainer(deployment)
        location = SnapshotLocation(job.account, job.id, POLICY_SLOT)
        return location, await asyncio.to_thread(self._digest, location, identity)

    async def _trainer(self, deployment: DeploymentRow) -> JobRow:
        """The job whose snapshots the deployment loads."""
        named = deployment.config.hot_load_trainer_job
        if named:
            job_id = named.rpartition("/")[2]
            job = await self.database.transact(lambda c: tables.job(c, job_id))
            if job is not None:
                return job
        jobs = await self.database.transact(tables.jobs)
        writers = [job for job in jobs if _writes_to(job, deployment)]
        if not writers:
            raise FailedPrecondition(
                f"deployment {deployment.id!r} follows no trainer, so it has no snapshots",
                hint="PATCH the deployment's hotLoadTrainerJob",
            )
        return writers[-1]

    def _digest(self, location: SnapshotLocation, identity: str) -> str:
        key = _sampler(location, identity)
        if self.store.exists(key):
            return self.store.loadable(key).digest
        state = CheckpointKey(
            location.account, location.job, location.slot, CheckpointFamily.STATE, identity
        )
        if self.store.exists(state):
            raise WrongCheckpointKind(
                f"{identity!r} is a train state, not a sampler snapshot",
                hint="save it with save_weights_for_sampler",
                field="identity",
            )
        return self.store.loadable(key).digest


def _sampler(location: SnapshotLocation, identity: str) -> CheckpointKey:
    where = location.account, location.job, location.slot
    return CheckpointKey(*where, CheckpointFamily.SAMPLER, identity)


def hot_load_status(deployment: DeploymentRow, seen: Mapping[int, SeenReplica]) -> HotLoadStatus:
    """Replicas that have answered. Pure."""
    return HotLoadStatus(
        [
            _loaded_replica(deployment.desired, view)
            for _, view in sorted(seen.items())
            if view.status
        ]
    )


def is_settled(deployment: DeploymentRow, seen: Mapping[int, SeenReplica]) -> bool:
    """No replica is on its way to other weights, and none is still to come."""
    if deployment.state not in DEPLOYMENT_LIVE or deployment.config.num_replicas == 0:
        return True
    return bool(seen) and all(
        has_settled_weights(deployment.desired, view) for view in seen.values()
    )


def _loaded_replica(desired: DesiredWeights, seen: SeenReplica) -> LoadedReplica:
    """Ready with the wanted name means done to a client, so other weights of that name are not ready."""
    assert seen.status is not None
    is_namesake = seen.status.identity == desired.identity and not has_settled_weights(
        desired, seen
    )
    return LoadedReplica(
        current_snapshot_identity=seen.status.identity,
        readiness=seen.status.ready and not is_namesake,
        loading_state=_loading_state(desired, seen),
        homefire=ServedState(seen.status.digest, seen.status.canary, seen.status.attested_by),
    )


def _loading_state(desired: DesiredWeights, seen: SeenReplica) -> LoadingState:
    assert seen.status is not None
    error = hot_load_error(desired, seen)
    if error is not None:
        code = seen.status.error_code if error == seen.status.error else ""
        return LoadingState(HotLoadStage.ERROR, desired.identity, error, code)
    if has_settled_weights(desired, seen):
        return LoadingState(HotLoadStage.IDLE)
    if seen.signalled != desired.generation:
        return LoadingState("pending", desired.identity)
    draining = seen.status.stage is HotLoadStage.DRAINING
    return LoadingState(
        HotLoadStage.DRAINING if draining else HotLoadStage.LOADING, desired.identity
    )


def _writes_to(job: JobRow, deployment: DeploymentRow) -> bool:
    named = job.config.request.hot_load_deployment_id
    if not named or job.account != deployment.account:
        return False
    return named.rpartition("/")[2] == deployment.id


def _reset_prompt_cache(asked: bool | str) -> bool:
    if isinstance(asked, bool):
        return asked
    if asked not in _PROMPT_CACHE_MODES:
        raise InvalidArgument(
            f"reset_prompt_cache {asked!r} is unknown",
            hint=f"use a boolean or one of {', '.join(sorted(_PROMPT_CACHE_MODES))}",
            field="reset_prompt_cache",
        )
    return asked == "all"


def check_drain_timeout(seconds: float | None, *, field: str) -> None:
    """InvalidArgument; NaN is refused too."""
    if seconds is not None and not 0 <= seconds <= _MAX_DRAIN_S:
        raise InvalidArgument(
            f"{field} {seconds} is not between 0 and {_MAX_DRAIN_S:.0f} seconds", field=field
        )


def _transition(configured: str | None) -> Transition:
    return Transition(configured) if configured in ("SYNC", "ASYNC") else Transition.DRAIN


def _refuse_strict_async(signal: HotLoadSignal, transition: Transition) -> None:
    if signal.drain is Drain.STRICT and transition is Transition.ASYNC:
        raise InvalidArgument(
            "drain 'strict' lets no request go on in place, and ASYNC lets all of them",
            hint="leave drain out, or PATCH the deployment's hotLoadTransitionType to DRAIN or SYNC",
            field="drain",
        )


def _read_ledger(root: Path) -> list[LedgerEntry]:
    entries: list[LedgerEntry] = []
    for path in sorted(root.glob("*/events.jsonl")):
        for _, event in read_events(path):
            if event.get("event") == "hot_load":
                entries.append(_ledger_entry(event))
    return sorted(entries, key=lambda entry: entry.at)


def _ledger_entry(event: Mapping[str, object]) -> LedgerEntry:
    return LedgerEntry(
        identity=str(event.get("identity") or BASE_IDENTITY),
        digest=str(event.get("digest") or ""),
        at=_number(event.get("at")),
        ok=event.get("ok") is True,
        load_ms=_number(event.get("load_ms")),
        drain_ms=_number(event.get("drain_ms")),
        canary=CanaryVerdict(event.get("canary") or CanaryVerdict.ABSENT),
        num_stragglers=int(_number(event.get("num_stragglers"))),
        reseeded=event.get("reseeded") is True,
        error=str(event.get("error") or ""),
        error_code=str(event.get("error_code") or ""),
    )


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
