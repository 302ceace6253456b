"""Root requests that a sampler answers: a replica of the deployment that their ids name.

A sampling future lives in its replica. Where it is lost, or where a sample could not be submitted
yet, the answer is 410: every client then submits the sample again under a new number.
"""

from __future__ import annotations

from typing import Any

from homefire.gateway.caller import Caller
from homefire.gateway.control_calls import ControlCalls
from homefire.gateway.envelope import Envelope
from homefire.gateway.promises import is_waiting, waiting_promise
from homefire.gateway.proxy import UpstreamDown, UpstreamLost
from homefire.gateway.replica_choice import choose_replica
from homefire.gateway.routing import Router
from homefire.gateway.upstreams import Upstreams
from homefire.wire.errors import (
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Unavailable,
    Unsupported,
)
from homefire.wire.internal import DeploymentRoute
from homefire.wire.pooled import is_sampler, parse_sampling_session, service_of
from homefire.wire.resources import DeploymentState
from homefire.wire.specs import Upstream

_MOST_SAMPLES = 4096
_ENDED = frozenset({DeploymentState.FAILED, DeploymentState.DELETING, DeploymentState.DELETED})
_GONE = 410


class RootSamplers:
    def __init__(self, router: Router, calls: ControlCalls, upstreams: Upstreams) -> None:
        self._router = router
        self._calls = calls
        self._upstreams = upstreams

    async def sample(self, caller: Caller, envelope: Envelope) -> None:
        sampler = _sampler_of(envelope, "asample")
        num_samples = 1 if envelope.num_samples is None else envelope.num_samples
        if not 0 < num_samples <= _MOST_SAMPLES:
            raise InvalidArgument(
                f"num_samples {num_samples} is not between 1 and {_MOST_SAMPLES}",
                field="num_samples",
            )
        try:
            await self._forward(caller, sampler, hold_s=self._router.holds.request_s)
        except UpstreamDown:
            promise = waiting_promise(sampler)
            ids = [f"{promise}.{number}" for number in range(num_samples)]
            await caller.answer_json({"request_id": promise, "sample_sequence_ids": ids})
        except UpstreamLost as exc:
            raise self._unavailable(caller, sampler, exc) from exc

    async def join(self, caller: Caller, envelope: Envelope) -> None:
        sampler = _sampler_of(envelope, "join_sampling_session")
        try:
            await self._forward(caller, sampler, hold_s=self._router.holds.request_s)
        except (UpstreamDown, UpstreamLost) as exc:
            raise self._unavailable(caller, sampler, exc) from exc

    async def retrieve(self, caller: Caller, request_id: str) -> None:
        sampler, hold_s = service_of(request_id), self._router.holds.future_s
        try:
            if is_waiting(request_id):
                await self._until_up(caller, sampler, hold_s=hold_s)
                await _answer_gone(caller, "the sampler is up: sample again")
            else:
                await self._forward(caller, sampler, hold_s=hold_s)
        except (UpstreamDown, UpstreamLost) as exc:
            await caller.answer_json(self._try_again(caller, sampler, request_id, exc), status=408)
        except NotFound as error:
            await _answer_gone(caller, error.message)
        except FailedPrecondition as error:
            await caller.answer_json({"error": str(error), "category": "server"})

    async def cancel(self, caller: Caller, request_id: str) -> None:
        """A sampler that is down has cancelled everything."""
        try:
            await self._forward(caller, service_of(request_id), hold_s=0.0)
        except (UpstreamDown, UpstreamLost, NotFound, FailedPrecondition):
            await caller.answer_json({})

    async def _forward(self, caller: Caller, sampler: str, *, hold_s: float) -> None:
        """Raises NotFound for a sampler of nothing, FailedPrecondition for one that failed."""
        await self._wake_if_silent(caller.account, sampler)

        def choose(refused: frozenset[str]) -> Upstream | None:
            route = self._route(caller.account, sampler)
            replicas = [up for up in route.replicas if up.socket not in refused]
            return choose_replica(replicas, in_flight=self._upstreams.in_flight)

        await self._router.forward(caller, caller.target, choose, hold_s=hold_s)

    async def _until_up(self, caller: Caller, sampler: str, *, hold_s: float) -> None:
        """Raises UpstreamDown when it is not up in time."""
        await self._wake_if_silent(caller.account, sampler)
        await self._router.wait(
            lambda: bool(self._route(caller.account, sampler).replicas), hold_s=hold_s
        )

    async def _wake_if_silent(self, account: str, sampler: str) -> None:
        route = self._router.feed.table.deployments.get(f"{account}/{sampler}")
        if route is None or not route.replicas:
            await self._calls.wake(account, sampler)
            await self._router.feed.refresh()

    def _route(self, account: str, sampler: str) -> DeploymentRoute:
        route = self._router.feed.table.deployments.get(f"{account}/{sampler}")
        if route is None:
            return DeploymentRoute(DeploymentState.CREATING, [], "it is being created")
        if not route.replicas and route.state in _ENDED:
            raise FailedPrecondition(
                f"sampler {sampler} is in state {route.state}: {route.detail}",
                hint=f"`homefire logs {sampler}` shows why; a new sampling client tries again",
            )
        return route

    def _try_again(
        self, caller: Caller, sampler: str, request_id: str, exc: Exception
    ) -> dict[str, Any]:
        return {
            "type": "try_again",
            "request_id": request_id,
            "queue_state": "paused_capacity",
            "queue_state_reason": self._why_silent(caller, sampler, exc),
        }

    def _unavailable(self, caller: Caller, sampler: str, exc: Exception) -> Unavailable:
        return Unavailable(self._why_silent(caller, sampler, exc), hint="retry in a second")

    def _why_silent(self, caller: Caller, sampler: str, exc: Exception) -> str:
        route = self._router.feed.table.deployments.get(f"{caller.account}/{sampler}")
        detail = route.detail if route is not None and route.detail else str(exc)
        return f"sampler {sampler} does not answer: {detail}"


def _sampler_of(envelope: Envelope, operation: str) -> str:
    session_id = envelope.sampling_session_id
    if not session_id:
        raise Unsupported(
            f"{operation} without sampling_session_id is not supported",
            hint="call create_sampling_session first",
            field="sampling_session_id",
        )
    sampler = parse_sampling_session(session_id).sampler
    if not is_sampler(sampler):
        raise InvalidArgument(f"{session_id!r} is no sampling session", field="sampling_session_id")
    return sampler


async def _answer_gone(caller: Caller, message: str) -> None:
    await caller.answer_json({"detail": message}, status=_GONE)
