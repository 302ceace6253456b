"""Telling trainers that a session is over, so that they let go of its models' weights."""

from __future__ import annotations

import asyncio
import logging

from homefire.control.db import tinker_tables
from homefire.control.db.database import Database
from homefire.control.observations import Observations
from homefire.foundation.clock import Clock
from homefire.wire.errors import HomefireError

log = logging.getLogger(__name__)
_AGAIN_S = 2.0
_TIMEOUT_S = 5.0


class Closing:
    """Called after every pass of the reconciler. A trainer that is down is told when it is back."""

    def __init__(self, *, database: Database, observations: Observations, clock: Clock) -> None:
        self._database = database
        self._observations = observations
        self._clock = clock
        self._not_before = 0.0

    async def close_finished(self) -> float | None:
        """When to try again; None when every running trainer knows."""
        now = self._clock.now()
        if now < self._not_before:
            return self._not_before
        unclosed = await self._database.transact(tinker_tables.unclosed_runs)
        told = [await self._tell(session, job) for session, job in unclosed]
        if all(told):
            return None
        self._not_before = now + _AGAIN_S
        return self._not_before

    async def _tell(self, session: str, job: str) -> bool:
        client = self._observations.trainer_client(job)
        if client is None:
            return False
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                await client.post(f"/api/v1/sessions/{session}/finish", {}, dict[str, object])
        except (HomefireError, TimeoutError) as exc:
            log.warning("%s was not told that session %s is over: %s", job, session, exc)
            return False
        now = self._clock.now()
        await self._database.transact(
            lambda c: tinker_tables.close_runs(c, session=session, job=job, now=now)
        )
        return True
