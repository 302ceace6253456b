"""`/training/v1/rlorTrainerJobs/{account}/{job}/api/v1/…`: a trainer's front, or a stand-in for it.

Training bodies are never parsed here. The one body that is looked at is `retrieve_future`'s, and
only to name the request in the 408 that keeps the client waiting.
"""

from __future__ import annotations

from homefire.gateway import stand_in
from homefire.gateway.caller import Caller
from homefire.gateway.proxy import UpstreamDown, UpstreamLost
from homefire.gateway.routing import Router
from homefire.wire.errors import NotFound
from homefire.wire.internal import TrainerRoute
from homefire.wire.specs import Upstream

_MAX_FUTURE_BYTES = 1 << 20
_ANSWERED_AT_ONCE = frozenset({"healthz", "session_heartbeat", "telemetry"})


class TrainingPlane:
    def __init__(self, router: Router) -> None:
        self._router = router

    async def answer(self, caller: Caller) -> None:
        account, job = caller.path_parameter("account"), caller.path_parameter("job")
        operation = caller.path_parameter("operation")
        if account != caller.account:
            raise NotFound(f"account {caller.account!r} has no trainer job {account}/{job}")
        body = b""
        if operation == "retrieve_future":
            body = await caller.body.read(max_bytes=_MAX_FUTURE_BYTES)
        await self._make_sure_of(account, job)
        try:
            await self._forward(caller, operation, account, job)
        except (UpstreamDown, UpstreamLost) as exc:
            route = self._route(account, job)
            status, answer = stand_in.answer(operation, job, route, body=body, reason=str(exc))
            await caller.answer_json(answer, status=status)

    async def _forward(self, caller: Caller, operation: str, account: str, job: str) -> None:
        def choose(refused: frozenset[str]) -> Upstream | None:
            route = self._route(account, job)
            if stand_in.is_ended(route):
                raise UpstreamDown(route.state)
            upstream = route.upstream
            return None if upstream is None or upstream.socket in refused else upstream

        # /training/v1/rlorTrainerJobs/{account}/{job} is stripped: the front serves /api/v1/…
        target = "/" + caller.target.split("/", 6)[6]
        await self._router.forward(caller, target, choose, hold_s=self._hold_s(operation))

    def _hold_s(self, operation: str) -> float:
        if operation in _ANSWERED_AT_ONCE:
            return 0.0
        holds = self._router.holds
        return holds.future_s if operation == "retrieve_future" else holds.request_s

    async def _make_sure_of(self, account: str, job: str) -> None:
        """A job that was just created or resumed may be newer than the table at hand."""
        route = self._router.feed.table.trainers.get(f"{account}/{job}")
        if route is None or route.upstream is None:
            await self._router.feed.refresh()

    def _route(self, account: str, job: str) -> TrainerRoute:
        route = self._router.feed.table.trainers.get(f"{account}/{job}")
        if route is None:
            raise NotFound(
                f"trainer job {job!r} does not exist",
                hint="`homefire trainer list` shows the jobs of this account",
            )
        return route
