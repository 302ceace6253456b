"""`/v1/…`, hot load and the model list: all answered by control."""

from __future__ import annotations

from homefire.gateway.caller import Caller
from homefire.gateway.proxy import UpstreamDown, UpstreamLost
from homefire.gateway.routing import Router
from homefire.wire.errors import Unavailable
from homefire.wire.specs import Upstream


class ControlPlane:
    def __init__(self, router: Router) -> None:
        self._router = router

    async def answer(self, caller: Caller) -> None:
        try:
            await self.forward(caller, hold_s=self._router.holds.request_s)
        except (UpstreamDown, UpstreamLost) as exc:
            raise Unavailable(
                f"control does not answer ({exc})",
                hint="trainers and deployments go on; retry in a second",
            ) from exc

    async def forward(self, caller: Caller, *, hold_s: float) -> None:
        """Raises UpstreamDown, UpstreamLost."""
        await self._router.forward(caller, caller.target, self._choose, hold_s=hold_s)

    def _choose(self, refused: frozenset[str]) -> Upstream | None:
        control = self._router.feed.control
        return None if control.socket in refused else control
