"""`/api/v1`: what the root Tinker plane asks of control, as clients send it."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from homefire.control.endpoints import Endpoint
from homefire.control.plane import ControlPlane
from homefire.http.app import account_of, respond
from homefire.http.bodies import json_response, read_json
from homefire.wire.errors import FailedPrecondition
from homefire.wire.pooled import service_of
from homefire.wire.tinker import CreateSession, SessionRef
from homefire.wire.tinker_root import (
    CreateSamplingSession,
    FinishSession,
    Sampler,
    SamplingSessionCreated,
    ServerCapabilities,
    SessionCreated,
)

_GONE = 410
"""At which clients stop their heartbeats for good; nothing else may answer with it."""


async def create_session(plane: ControlPlane, request: Request) -> Response:
    account = account_of(request)
    session = await plane.tinker.sessions.create(account, await read_json(request, CreateSession))
    return json_response(SessionCreated(session.id))


async def heartbeat(plane: ControlPlane, request: Request) -> Response:
    account = account_of(request)
    body = await read_json(request, SessionRef)
    session = await plane.tinker.sessions.heartbeat(account, body.session_id)
    if session.finished_at is not None:
        error = FailedPrecondition(f"session {session.id} was finished ({session.finish_reason})")
        return respond(request, error, status=_GONE)
    return json_response({"type": "session_heartbeat"})


async def finish_session(plane: ControlPlane, request: Request) -> Response:
    account = account_of(request)
    body = await read_json(request, FinishSession)
    await plane.tinker.sessions.finish(
        account,
        request.path_params["session"],
        reason=body.reason.type if body.reason else "success",
        detail=body.detail or "",
    )
    plane.reconciler.wake()
    return json_response({})


async def capabilities(plane: ControlPlane, request: Request) -> Response:
    account_of(request)
    return json_response(ServerCapabilities(await plane.tinker.base_models.supported()))


async def create_sampling_session(plane: ControlPlane, request: Request) -> Response:
    account = account_of(request)
    body = await read_json(request, CreateSamplingSession)
    created = await plane.tinker.samplers.create_session(account, body)
    await plane.until_route_is_current(account, service_of(created))
    return json_response(SamplingSessionCreated(created))


async def get_sampler(plane: ControlPlane, request: Request) -> Response:
    session = request.path_params["sampler"]
    return json_response(await plane.tinker.samplers.describe(account_of(request), session))


ENDPOINTS = [
    Endpoint(
        "POST",
        "/api/v1/create_session",
        create_session,
        "A session of the root plane",
        SessionCreated,
        CreateSession,
    ),
    Endpoint(
        "POST",
        "/api/v1/session_heartbeat",
        heartbeat,
        "The client is there; 410 after the session was finished",
        body=SessionRef,
    ),
    Endpoint(
        "POST",
        "/api/v1/sessions/{session}/finish",
        finish_session,
        "The session is over; its first reason stays",
        body=FinishSession,
    ),
    Endpoint(
        "GET",
        "/api/v1/get_server_capabilities",
        capabilities,
        "The base models that can be trained and sampled",
        ServerCapabilities,
    ),
    Endpoint(
        "POST",
        "/api/v1/create_sampling_session",
        create_sampling_session,
        "Sample a base model or a saved snapshot",
        SamplingSessionCreated,
        CreateSamplingSession,
    ),
    Endpoint(
        "GET",
        "/api/v1/samplers/{sampler}",
        get_sampler,
        "What a sampling session samples from",
        Sampler,
    ),
]
