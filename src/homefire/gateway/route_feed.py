"""The gateway's routing table, kept current by one long poll of control."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import aiohttp
import msgspec

from homefire.foundation.versioned import Versioned
from homefire.gateway.upstreams import Upstreams
from homefire.wire.internal import SECRET_HEADER, KeyRoute, RouteTable
from homefire.wire.specs import Upstream

log = logging.getLogger(__name__)

_POLL_S = 20.0
_ANSWER_MARGIN_S = 10.0
_REFRESH_TIMEOUT_S = 2.0
_FIRST_RETRY_S = 0.05
_LONGEST_RETRY_S = 1.0
UNKNOWN = RouteTable(version=0)
"""What is routed before any table was seen: nothing, and no key is known."""


class RouteFeed:
    """Holds the last table that control published; a dead control changes nothing here.

    Example: `feed.table.trainers["local/job-3f9a1c2e"].upstream`.
    """

    def __init__(
        self, control: Upstream, upstreams: Upstreams, *, saved: RouteTable = UNKNOWN
    ) -> None:
        self.control = control
        self._upstreams = upstreams
        self._tables = Versioned(saved)
        self._refreshing = asyncio.Lock()
        self._refreshes = 0

    @property
    def table(self) -> RouteTable:
        return self._tables.get()

    @property
    def version(self) -> int:
        """Counts the tables seen by this process; control's own number may start again."""
        return self._tables.version

    async def change(self, *, after: int, timeout_s: float) -> None:
        """Returns when a table newer than `after` is here, or after `timeout_s`."""
        await self._tables.wait_beyond(after=after, timeout_s=timeout_s)

    async def keys(self, *, wait_s: float) -> Sequence[KeyRoute]:
        """The known keys; before the first table, what arrives within `wait_s`, else nothing."""
        if not self.table.keys:
            await self.refresh()
        if not self.table.keys:
            await self.change(after=self.version, timeout_s=wait_s)
        return self.table.keys

    async def follow(self) -> NoReturn:
        """Polls for ever. A restarted control counts versions anew, so after a failure ask afresh."""
        after: int | None = None
        retry_s = _FIRST_RETRY_S
        while True:
            try:
                table = await self._ask(after, timeout_s=_POLL_S + _ANSWER_MARGIN_S)
            except (aiohttp.ClientError, OSError, msgspec.MsgspecError) as exc:
                after = None
                log.debug("control does not answer, asking again in %.2f s: %s", retry_s, exc)
                await asyncio.sleep(retry_s)
                retry_s = min(2 * retry_s, _LONGEST_RETRY_S)
                continue
            retry_s = _FIRST_RETRY_S
            if table.version != after:
                await self._accept(table)
            after = table.version

    async def refresh(self) -> None:
        """Asks control now, before something is refused for not being in the table.

        Callers that arrive while one asks share the next answer. With control down the last
        table stays.
        """
        seen = self._refreshes
        async with self._refreshing:
            if self._refreshes > seen:
                return
            self._refreshes += 1
            try:
                table = await self._ask(None, timeout_s=_REFRESH_TIMEOUT_S)
            except (aiohttp.ClientError, OSError, msgspec.MsgspecError) as exc:
                log.debug("control does not answer: %s", exc)
                return
            if table != self.table:
                await self._accept(table)

    async def _ask(self, after: int | None, *, timeout_s: float) -> RouteTable:
        query = {} if after is None else {"after": str(after), "wait_s": str(_POLL_S)}
        async with self._upstreams.session(self.control).get(
            "http://service/internal/routes",
            params=query,
            headers={SECRET_HEADER: self.control.secret},
            timeout=aiohttp.ClientTimeout(total=timeout_s),
            raise_for_status=True,
        ) as response:
            return msgspec.json.decode(await response.read(), type=RouteTable)

    async def _accept(self, table: RouteTable) -> None:
        self._tables.set(table)
        await self._upstreams.keep_only({self.control.socket, *_sockets(table)})


def read_saved_table(path: Path) -> RouteTable:
    """The table of the last run, so that a gateway can start before control does."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=RouteTable)
    except FileNotFoundError:
        return UNKNOWN
    except msgspec.MsgspecError as exc:
        log.warning("%s is not a routing table, so waiting for control: %s", path, exc)
        return UNKNOWN


def _sockets(table: RouteTable) -> set[str]:
    trainers = {route.upstream.socket for route in table.trainers.values() if route.upstream}
    replicas = {up.socket for route in table.deployments.values() for up in route.replicas}
    return trainers | replicas
