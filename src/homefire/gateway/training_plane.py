"""`/training/v1/rlorTrainerJobs/{account}/{job}/api/v1/…`: a trainer's front, or a stand-in for it.

Training bodies are never parsed here. The one body that is looked at is `retrieve_future`'s, and
only to name the request in the 408 that keeps the client waiting.

A paused job is woken by what it would have to do, never by a client that merely waits or lives on:
what was paused while a client works would be back at once.
"""

from __future__ import annotations

from homefire.gateway import stand_in
from homefire.gateway.caller import Caller
from homefire.gateway.control_calls import ControlCalls
from homefire.gateway.proxy import UpstreamDown, UpstreamLost
from homefire.gateway.trainers import Trainers
from homefire.wire.errors import NotFound
from homefire.wire.resources import JobState

_WAKES_NOTHING = frozenset(
    {
        "cancel_future",
        "client/config",
        "client/dynamic_config",
        "get_server_capabilities",
        "healthz",
        "list_checkpoints",
        "retrieve_future",
        "session_heartbeat",
        "telemetry",
    }
)
_MAX_FUTURE_BYTES = 1 << 20


class TrainingPlane:
    def __init__(self, trainers: Trainers, calls: ControlCalls) -> None:
        self._trainers = trainers
        self._calls = calls

    async def answer(self, caller: Caller) -> None:
        account, job = caller.path_parameter("account"), caller.path_parameter("job")
        operation = caller.path_parameter("operation")
        if account != caller.account:
            raise NotFound(f"account {caller.account!r} has no trainer job {account}/{job}")
        body = b""
        if operation == "retrieve_future":
            body = await caller.body.read(max_bytes=_MAX_FUTURE_BYTES)
        await self._wake(account, job, operation)
        # /training/v1/rlorTrainerJobs/{account}/{job} is stripped: the front serves /api/v1/…
        target = "/" + caller.target.split("/", 6)[6]
        try:
            await self._trainers.forward(caller, operation, target, account=account, job=job)
        except (UpstreamDown, UpstreamLost) as exc:
            route = self._trainers.route(account, job)
            status, answer = stand_in.answer(operation, job, route, body=body, reason=str(exc))
            await caller.answer_json(answer, status=status)

    async def _wake(self, account: str, job: str, operation: str) -> None:
        route = await self._trainers.current_route(account, job)
        is_paused = route.upstream is None and route.state == JobState.PAUSED
        if is_paused and operation not in _WAKES_NOTHING and not _finishes_session(operation):
            await self._calls.wake(account, job)
            await self._trainers.current_route(account, job)


def _finishes_session(operation: str) -> bool:
    return operation.startswith("sessions/") and operation.endswith("/finish")
