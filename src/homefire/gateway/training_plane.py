"""`/training/v1/rlorTrainerJobs/{account}/{job}/api/v1/…`: a trainer's front, or a stand-in for it.

Training bodies are never parsed here. The one body that is looked at is `retrieve_future`'s, and
only to name the request in the 408 that keeps the client waiting.
"""

from __future__ import annotations

from homefire.gateway import stand_in
from homefire.gateway.caller import Caller
from homefire.gateway.proxy import UpstreamDown, UpstreamLost
from homefire.gateway.trainers import Trainers
from homefire.wire.errors import NotFound

_MAX_FUTURE_BYTES = 1 << 20


class TrainingPlane:
    def __init__(self, trainers: Trainers) -> None:
        self._trainers = trainers

    async def answer(self, caller: Caller) -> None:
        account, job = caller.path_parameter("account"), caller.path_parameter("job")
        operation = caller.path_parameter("operation")
        if account != caller.account:
            raise NotFound(f"account {caller.account!r} has no trainer job {account}/{job}")
        body = b""
        if operation == "retrieve_future":
            body = await caller.body.read(max_bytes=_MAX_FUTURE_BYTES)
        await self._trainers.current_route(account, job)
        # /training/v1/rlorTrainerJobs/{account}/{job} is stripped: the front serves /api/v1/…
        target = "/" + caller.target.split("/", 6)[6]
        try:
            await self._trainers.forward(caller, operation, target, account=account, job=job)
        except (UpstreamDown, UpstreamLost) as exc:
            route = self._trainers.route(account, job)
            status, answer = stand_in.answer(operation, job, route, body=body, reason=str(exc))
            await caller.answer_json(answer, status=status)
