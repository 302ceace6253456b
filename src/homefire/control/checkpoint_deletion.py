"""Taking checkpoints away: one that the user names, and all that have expired."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from homefire.checkpoints import CheckpointKey, CheckpointStore
from homefire.control.checkpoint_needs import MAY_REPLAY, Needs, descendant_refusal
from homefire.control.db import tables
from homefire.control.db.database import Database
from homefire.control.db.rows import DeploymentRow, JobRow
from homefire.control.job_activity import Activities
from homefire.control.observations import Observations
from homefire.wire.errors import HomefireError, Unavailable
from homefire.wire.manifest import Manifest

log = logging.getLogger(__name__)
PRUNE_EVERY_S = 300.0


@dataclass(frozen=True)
class CheckpointDeletion:
    database: Database
    store: CheckpointStore
    activities: Activities
    observations: Observations

    async def delete(self, manifest: Manifest) -> None:
        """FailedPrecondition, naming it, while something rests on the checkpoint: a delta, a
        deployment, a job whose trainer cannot be asked to do without."""
        needs = await self._needs()
        if loading := needs.jobs_that_load(manifest):
            await asyncio.gather(*map(self._forget_loads, loading))
            needs = await self._needs()

        def work() -> None:
            siblings = self.store.list(manifest.account, manifest.job, slot=manifest.slot)
            refusal = needs.refusal(manifest) or descendant_refusal(manifest, siblings)
            if refusal is not None:
                raise refusal
            self.store.delete(CheckpointKey.of(manifest))

        await asyncio.to_thread(work)

    async def prune(self) -> Sequence[CheckpointKey]:
        """What expired a while ago and nothing rests on goes."""
        needs = await self._needs()
        return await asyncio.to_thread(self.store.prune, needs.is_needed)

    async def prune_for_ever(self) -> None:
        """A background task; a disk that refuses is tried again."""
        while True:
            try:
                for key in await self.prune():
                    log.info("%s has expired and was deleted", key)
            except (HomefireError, OSError) as exc:
                log.warning("expired checkpoints could not be deleted: %s", exc)
            await asyncio.sleep(PRUNE_EVERY_S)

    async def _forget_loads(self, job_id: str) -> None:
        """Asks a running trainer for a recovery point; without one the refusal stands."""
        client = self.observations.trainer_client(job_id)
        if client is not None:
            with contextlib.suppress(Unavailable):
                await client.post("/internal/forget_loads", {}, dict[str, str])

    async def _needs(self) -> Needs:
        jobs, deployments = await self.database.transact(
            lambda c: (tables.jobs(c), tables.deployments(c))
        )
        return await asyncio.to_thread(self._read_needs, jobs, deployments)

    def _read_needs(self, jobs: list[JobRow], deployments: list[DeploymentRow]) -> Needs:
        replaying = [job.id for job in jobs if job.state in MAY_REPLAY]
        return Needs(deployments, jobs, {job: self.activities.of(job).loads for job in replaying})
