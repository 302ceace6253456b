"""Completions, chat completions and token generation: a replica of a deployment answers.

The same below `/inference/v1`, where a model that does not exist is a 400, since Fireworks' clients wait
for a minute on a 404, and below `/v1`, where it is the 404 that OpenAI's clients expect.
"""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.types import Message

from homefire.gateway.addressing import deployment_key, snapshot_path
from homefire.gateway.caller import Caller
from homefire.gateway.control_calls import ControlCalls
from homefire.gateway.proxy import UpstreamDown, UpstreamLost
from homefire.gateway.replica_choice import choose_replica, routing_prefix
from homefire.gateway.routing import Router
from homefire.gateway.upstreams import Upstreams
from homefire.http.bodies import decode_json, read_body
from homefire.wire.errors import (
    FailedPrecondition,
    HomefireError,
    ModelNotFound,
    Unavailable,
    UnknownDeployment,
)
from homefire.wire.internal import DeploymentRoute
from homefire.wire.pooled import is_sampler
from homefire.wire.resources import DeploymentState
from homefire.wire.specs import Upstream

_MAX_BODY_BYTES = 64 << 20
_SESSION_HEADERS = ("x-session-affinity", "x-multi-turn-session-id", "x-session-id")
_ENDED = frozenset({DeploymentState.FAILED, DeploymentState.DELETING, DeploymentState.DELETED})


class _Envelope(msgspec.Struct):
    """The part of an inference request that the gateway reads."""

    model: str = ""
    user: Any = None
    prompt: msgspec.Raw = msgspec.Raw()
    messages: msgspec.Raw = msgspec.Raw()

    @property
    def prefix(self) -> bytes:
        prompt, messages = memoryview(self.prompt), memoryview(self.messages)
        return routing_prefix(messages or prompt)


class InferencePlane:
    def __init__(self, router: Router, calls: ControlCalls, upstreams: Upstreams) -> None:
        self._router = router
        self._calls = calls
        self._upstreams = upstreams

    async def answer(self, caller: Caller) -> None:
        try:
            await self._answer(caller)
        except UnknownDeployment as exc:
            if caller.target.startswith("/inference/"):
                raise
            raise ModelNotFound(exc.message, hint=exc.hint, field="model") from exc

    async def _answer(self, caller: Caller) -> None:
        envelope = await _read_envelope(caller)
        key = await self._deployment(caller, envelope.model)
        await self._wake_if_parked(key)
        session, prefix = _session(caller, envelope), envelope.prefix

        def choose(refused: frozenset[str]) -> Upstream | None:
            route = self._route(key)
            replicas = [up for up in route.replicas if up.socket not in refused]
            return choose_replica(
                replicas, in_flight=self._upstreams.in_flight, session=session, prefix=prefix
            )

        try:
            await self._router.forward(
                caller, caller.target, choose, hold_s=self._router.holds.request_s
            )
        except (UpstreamDown, UpstreamLost) as exc:
            raise self._why_down(key, exc) from exc

    async def _deployment(self, caller: Caller, model: str) -> str:
        """The key of the deployment; one that was just created may be newer than the table."""
        feed = self._router.feed
        if (snapshot := snapshot_path(model)) is not None:
            key = f"{caller.account}/{await self._calls.sampler_of(caller.account, snapshot)}"
            if key not in feed.table.deployments:
                await feed.refresh()
            return key
        header = caller.headers.get("fireworks-deployment", "")
        try:
            return deployment_key(feed.table, account=caller.account, model=model, header=header)
        except UnknownDeployment:
            await feed.refresh()
            return deployment_key(feed.table, account=caller.account, model=model, header=header)

    async def _wake_if_parked(self, key: str) -> None:
        """The sampler of a root job is parked when nobody uses it; others are scaled to zero by their users."""
        account, _, deployment = key.partition("/")
        route = self._router.feed.table.deployments.get(key)
        if is_sampler(deployment):
            if route is not None and route.replicas:
                return
            await self._calls.wake(account, deployment)
        elif route is not None and route.is_asleep:
            await self._calls.wake_deployment(account, deployment)
        else:
            return
        await self._router.feed.refresh()

    def _route(self, key: str) -> DeploymentRoute:
        route = self._router.feed.table.deployments.get(key)
        name = key.partition("/")[2]
        if route is None:
            raise UnknownDeployment(f"deployment {name!r} was deleted")
        if not route.replicas and route.state in _ENDED:
            raise FailedPrecondition(
                f"deployment {name!r} is in state {route.state}{_because(route)}",
                hint=f"`homefire logs {name}` shows why; delete it and create it again",
            )
        return route

    def _why_down(self, key: str, exc: Exception) -> HomefireError:
        route = self._router.feed.table.deployments.get(key)
        detail = _because(route) if route and route.detail else f": {exc}"
        return Unavailable(
            f"deployment {key.partition('/')[2]!r} has no replica that answers{detail}",
            hint="it may be starting; retry in a second",
        )


async def _read_envelope(caller: Caller) -> _Envelope:
    body = await caller.body.read(max_bytes=_MAX_BODY_BYTES)
    if "content-encoding" in caller.headers:
        body = await _decompressed(caller, body)
    return await decode_json(body or b"{}", _Envelope)


async def _decompressed(caller: Caller, body: bytes) -> bytes:
    async def receive() -> Message:
        return {"type": "http.request", "body": body, "more_body": False}

    return await read_body(Request(caller.scope, receive), max_bytes=_MAX_BODY_BYTES)


def _session(caller: Caller, envelope: _Envelope) -> str:
    for name in _SESSION_HEADERS:
        if value := caller.headers.get(name):
            return value
    return envelope.user if isinstance(envelope.user, str) else ""


def _because(route: DeploymentRoute) -> str:
    return f": {route.detail}" if route.detail else ""
