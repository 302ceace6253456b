"""Forwarding to a service that may be down for a moment: hold the request, do not spin."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from homefire.foundation.clock import Clock
from homefire.gateway.caller import Caller
from homefire.gateway.proxy import Proxy, UpstreamDown, UpstreamLost
from homefire.gateway.route_feed import RouteFeed
from homefire.wire.specs import Upstream

_SAFE_METHODS = frozenset({"GET", "HEAD"})
"""Asking again does no harm, even if a dying service had begun to answer."""

Choose = Callable[[frozenset[str]], Upstream | None]
"""Picks an upstream of the current table, given the sockets that just refused a connection."""


@dataclass(frozen=True)
class Holds:
    """How long requests wait for a service that is down or starting, in seconds."""

    request_s: float = 8.0
    """Of ordinary requests; clients time out at 30 s and retry on the 503."""
    future_s: float = 8.0
    """Of `retrieve_future`, before the 408 that makes the client poll again at once."""
    look_again_s: float = 0.5
    """A service can come back on its old socket without a new table, so look this often too."""


class Router:
    """Forwards to whichever upstream the newest table offers, for as long as the request may wait."""

    def __init__(self, feed: RouteFeed, proxy: Proxy, clock: Clock, holds: Holds) -> None:
        self.feed = feed
        self.holds = holds
        self._proxy = proxy
        self._clock = clock

    async def forward(self, caller: Caller, target: str, choose: Choose, *, hold_s: float) -> None:
        """Raises UpstreamDown when `hold_s` passed without an answer, and UpstreamLost as Proxy does
        except where asking again is safe.

        `choose` sees the current table each time; what it raises ends the wait.
        """
        deadline = self._clock.monotonic() + hold_s
        while True:
            seen = self.feed.version
            if await self._try_each(caller, target, choose):
                return
            left_s = deadline - self._clock.monotonic()
            if left_s <= 0:
                raise UpstreamDown(f"no answer within {hold_s:g} s")
            await self.feed.change(after=seen, timeout_s=min(left_s, self.holds.look_again_s))

    async def wait(self, until: Callable[[], bool], *, hold_s: float) -> None:
        """Returns when `until` holds of the current table; raises UpstreamDown after `hold_s`."""
        deadline = self._clock.monotonic() + hold_s
        while not until():
            left_s = deadline - self._clock.monotonic()
            if left_s <= 0:
                raise UpstreamDown(f"not within {hold_s:g} s")
            await self.feed.change(after=self.feed.version, timeout_s=left_s)

    async def _try_each(self, caller: Caller, target: str, choose: Choose) -> bool:
        refused: frozenset[str] = frozenset()
        while (upstream := choose(refused)) is not None:
            try:
                await self._proxy.forward(caller, upstream, target)
            except UpstreamDown:
                refused |= {upstream.socket}
            except UpstreamLost:
                if caller.method not in _SAFE_METHODS:
                    raise
                refused |= {upstream.socket}
            else:
                return True
        return False
