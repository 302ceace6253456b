"""Trainer fronts as the routing table knows them, and forwarding to one of them."""

from __future__ import annotations

from homefire.gateway import stand_in
from homefire.gateway.caller import Caller
from homefire.gateway.proxy import UpstreamDown
from homefire.gateway.routing import Router
from homefire.wire.errors import NotFound
from homefire.wire.internal import TrainerRoute
from homefire.wire.specs import Upstream

_ANSWERED_AT_ONCE = frozenset({"healthz", "session_heartbeat", "telemetry"})


class Trainers:
    def __init__(self, router: Router) -> None:
        self._router = router

    async def forward(
        self, caller: Caller, operation: str, target: str, *, account: str, job: str
    ) -> None:
        """Raises UpstreamDown at once for a job that has ended, else when the hold is over."""

        def choose(refused: frozenset[str]) -> Upstream | None:
            route = self.route(account, job)
            if stand_in.is_ended(route):
                raise UpstreamDown(route.state)
            upstream = route.upstream
            return None if upstream is None or upstream.socket in refused else upstream

        await self._router.forward(caller, target, choose, hold_s=self._hold_s(operation))

    async def current_route(self, account: str, job: str) -> TrainerRoute:
        """A job that was just created or resumed may be newer than the table at hand. NotFound."""
        route = self._router.feed.table.trainers.get(f"{account}/{job}")
        if route is None or route.upstream is None:
            await self._router.feed.refresh()
        return self.route(account, job)

    def route(self, account: str, job: str) -> TrainerRoute:
        route = self._router.feed.table.trainers.get(f"{account}/{job}")
        if route is None:
            raise NotFound(
                f"trainer job {job!r} does not exist",
                hint="`homefire trainer list` shows the jobs of this account",
            )
        return route

    def _hold_s(self, operation: str) -> float:
        if operation in _ANSWERED_AT_ONCE:
            return 0.0
        holds = self._router.holds
        return holds.future_s if operation == "retrieve_future" else holds.request_s
