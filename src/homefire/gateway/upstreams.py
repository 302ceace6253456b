"""Connections to the services behind the gateway: one pool per Unix socket."""

from __future__ import annotations

from collections import Counter

import aiohttp

from homefire.wire.specs import Upstream

_KEEP_ALIVE_S = 60.0
"""Less than the services' own 75 s, so that a kept connection is never closed under a request."""
_CONNECT_TIMEOUT_S = 5.0


class Upstreams:
    """Owned by one event loop. Pools are made on first use and closed when their service is gone."""

    def __init__(self) -> None:
        self._sessions: dict[str, aiohttp.ClientSession] = {}
        self.in_flight: Counter[str] = Counter()
        """Requests that each socket is working on."""

    def session(self, upstream: Upstream) -> aiohttp.ClientSession:
        session = self._sessions.get(upstream.socket)
        if session is None:
            session = self._sessions[upstream.socket] = _open(upstream.socket)
        return session

    async def keep_only(self, sockets: set[str]) -> None:
        """Closes the pools of services that are in no routing table any more and have no request."""
        for socket in self._sessions.keys() - sockets:
            if not self.in_flight[socket]:
                del self.in_flight[socket]
                await self._sessions.pop(socket).close()

    async def close(self) -> None:
        for session in self._sessions.values():
            await session.close()
        self._sessions.clear()


def _open(socket: str) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.UnixConnector(socket, limit=0, keepalive_timeout=_KEEP_ALIVE_S),
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None, connect=_CONNECT_TIMEOUT_S),
        auto_decompress=False,
        skip_auto_headers=("accept", "accept-encoding", "content-type", "user-agent"),
    )
