"""Taking checkpoints away: one that the user names, and all that have expired."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass, replace

from homefire.checkpoints import CheckpointKey, CheckpointStore
from homefire.control.checkpoint_needs import MAY_REPLAY, Needs, descendant_refusal
from homefire.control.db import tables, tinker_tables
from homefire.control.db.database import Database
from homefire.control.job_activity import Activities
from homefire.control.observations import Observations
from homefire.foundation.clock import Clock
from homefire.wire.errors import HomefireError, Unavailable
from homefire.wire.manifest import Manifest
from homefire.wire.resources import ModelState

log = logging.getLogger(__name__)
PRUNE_EVERY_S = 300.0
LIVE_S = 600.0
"""A session that was heard of so lately may still sample."""


@dataclass(frozen=True)
class CheckpointDeletion:
    database: Database
    store: CheckpointStore
    activities: Activities
    observations: Observations
    clock: Clock

    async def delete(self, manifest: Manifest) -> None:
        """FailedPrecondition, naming it, while something rests on the checkpoint: a delta, a
        deployment, a job whose trainer cannot be asked to do without."""
        needs = await self.needs()
        if loading := needs.jobs_that_load(manifest):
            await asyncio.gather(*map(self._forget_loads, loading))
            needs = await self.needs()

        def work() -> None:
            siblings = self.store.list(manifest.account, manifest.job, slot=manifest.slot)
            refusal = needs.refusal(manifest) or descendant_refusal(manifest, siblings)
            if refusal is not None:
                raise refusal
            self.store.delete(CheckpointKey.of(manifest))

        await asyncio.to_thread(work)

    async def prune(self) -> Sequence[CheckpointKey]:
        """What expired a while ago and nothing rests on goes."""
        needs = await self.needs()
        return await asyncio.to_thread(self.store.prune, needs.is_needed)

    async def prune_for_ever(self) -> None:
        """A background task; a disk that refuses is tried again. At first it waits: sessions that
        are alive have to be heard of since control started."""
        while True:
            await asyncio.sleep(PRUNE_EVERY_S)
            try:
                for key in await self.prune():
                    log.info("%s has expired and was deleted", key)
            except (HomefireError, OSError) as exc:
                log.warning("expired checkpoints could not be deleted: %s", exc)

    async def _forget_loads(self, job_id: str) -> None:
        """Asks a running trainer for a recovery point; without one the refusal stands."""
        client = self.observations.trainer_client(job_id)
        if client is not None:
            with contextlib.suppress(Unavailable):
                await client.post("/internal/forget_loads", {}, dict[str, str])

    async def needs(self) -> Needs:
        """What rests on checkpoints now."""
        since = self.clock.now() - LIVE_S

        def read(connection: sqlite3.Connection) -> Needs:
            return Needs(
                deployments=tables.deployments(connection),
                jobs=tables.jobs(connection),
                sampled_paths=frozenset(tinker_tables.paths_being_sampled(connection, since=since)),
                promoting=[
                    model
                    for model in tables.models(connection)
                    if model.state is ModelState.UPLOADING
                ],
                live_runs=frozenset(tinker_tables.live_runs(connection, since=since)),
            )

        needs = await self.database.transact(read)
        return await asyncio.to_thread(self._with_loads, needs)

    def _with_loads(self, needs: Needs) -> Needs:
        """Blocks on the disk."""
        replaying = [job.id for job in needs.jobs if job.state in MAY_REPLAY]
        return replace(needs, loads={job: self.activities.of(job).loads for job in replaying})
