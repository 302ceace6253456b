"""`/api/v1`: training runs, sessions and the key of the root Tinker plane; and what is refused."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import Response

from homefire.control.db import tables, tinker_tables
from homefire.control.endpoints import Endpoint
from homefire.control.paging import Window
from homefire.control.plane import ControlPlane
from homefire.control.tinker import presentation
from homefire.control.tinker.search import check_search, search_sessions
from homefire.http.app import account_of
from homefire.http.bodies import json_response, read_json
from homefire.wire.errors import InvalidArgument, NotFound, PermissionDenied, Unsupported
from homefire.wire.tinker_rest import (
    ApiKey,
    Cursor,
    KeyDetails,
    OrganizationDetails,
    ProjectRequest,
    Session,
    SessionList,
    SessionSearch,
    SessionSearchAnswer,
    TrainingRun,
    TrainingRunList,
    UserDetails,
)

_DEFAULT_LIMIT = 20
_SCOPES = ("owned", "accessible")
_RUNS = "/api/v1/training_runs"
_SESSIONS = "/api/v1/sessions"


async def list_runs(plane: ControlPlane, request: Request) -> Response:
    _check_scope(request)
    window = Window.of(request.query_params, default=_DEFAULT_LIMIT)
    project = request.query_params.get("project_id")
    views, total = await plane.management.listing.runs(
        account_of(request), window, project_id=project
    )
    runs = [presentation.training_run(view) for view in views]
    return json_response(TrainingRunList(runs, Cursor(window.offset, window.limit, total)))


async def get_run(plane: ControlPlane, request: Request) -> Response:
    _check_scope(request)
    view = await plane.management.listing.run(account_of(request), request.path_params["run"])
    return json_response(presentation.training_run(view))


async def list_sessions(plane: ControlPlane, request: Request) -> Response:
    _check_scope(request)
    window = Window.of(request.query_params, default=_DEFAULT_LIMIT)
    sessions = await plane.management.listing.sessions(account_of(request), window)
    return json_response(SessionList([session.id for session in sessions]))


async def get_session(plane: ControlPlane, request: Request) -> Response:
    _check_scope(request)
    session = request.path_params["session"]
    view = await plane.management.listing.session(account_of(request), session)
    return json_response(presentation.session(view))


async def assign_project(plane: ControlPlane, request: Request) -> Response:
    account, asked = account_of(request), await read_json(request, ProjectRequest)
    session = request.path_params["session"]
    await plane.management.listing.assign_project(account, session, asked.project_id)
    return json_response({})


async def search(plane: ControlPlane, request: Request) -> Response:
    account, asked = account_of(request), await read_json(request, SessionSearch)
    check_search(asked)
    rows = await plane.database.transact(lambda c: tinker_tables.sessions(c, account))
    now = plane.clock.now()
    page, following = search_sessions(rows, asked, now=now)
    summaries = [
        presentation.session_summary(row, manifests, now=now)
        for row, manifests in await plane.management.listing.with_checkpoints(page)
    ]
    return json_response(SessionSearchAnswer(summaries, following))


async def export_trace(plane: ControlPlane, request: Request) -> Response:
    session = request.path_params["session"]
    view = await plane.management.listing.session(account_of(request), session)
    jobs = ", ".join(sorted({run.job for run in view.runs})) or "none yet"
    raise Unsupported(
        "trace_export is not supported: no Perfetto traces of sessions are kept",
        hint="GET /v1/accounts/<account>/rlorTrainerJobs/<job>/metrics has times and losses of every "
        f"operation; jobs of this session: {jobs}",
    )


async def get_key(plane: ControlPlane, request: Request) -> Response:
    account = account_of(request)
    number = await plane.database.transact(lambda c: tables.key_number(c, account))
    if number is None:
        raise NotFound(f"account {account!r} has no key")
    details = KeyDetails(OrganizationDetails(account), UserDetails(f"{account}@localhost"))
    return json_response(ApiKey(number, account, f"the key of account {account!r}", details))


async def delete_key(plane: ControlPlane, request: Request) -> Response:
    account_of(request)
    raise PermissionDenied(
        "the key of a home is not deleted over the network",
        hint="stop `homefire up`, delete the file api_key in the home, and start it: a new key is made",
    )


def _refusal(what: str) -> Callable[[ControlPlane, Request], Awaitable[Response]]:
    async def refuse(plane: ControlPlane, request: Request) -> Response:
        account_of(request)
        raise NotFound(f"there is no {what} here: it belongs to the hosted service")

    return refuse


def _check_scope(request: Request) -> None:
    """Both scopes are the account's own: runs and sessions are not shared."""
    scope = request.query_params.get("access_scope", "owned")
    if scope not in _SCOPES:
        raise InvalidArgument(
            f"access_scope {scope[:40]!r} is unknown",
            hint=f"use {' or '.join(_SCOPES)}",
            field="access_scope",
        )


_WINDOW = ("limit", "offset", "access_scope")

ENDPOINTS = [
    Endpoint(
        "GET",
        _RUNS,
        list_runs,
        "Training runs, newest first",
        TrainingRunList,
        query=(*_WINDOW, "project_id"),
    ),
    Endpoint("GET", f"{_RUNS}/{{run}}", get_run, "One run", TrainingRun, query=("access_scope",)),
    Endpoint(
        "GET", _SESSIONS, list_sessions, "Session ids, newest first", SessionList, query=_WINDOW
    ),
    Endpoint(
        "POST",
        f"{_SESSIONS}/search",
        search,
        "Sessions that match, newest first",
        SessionSearchAnswer,
        SessionSearch,
    ),
    Endpoint(
        "GET",
        f"{_SESSIONS}/{{session}}",
        get_session,
        "A session's runs and samplers",
        Session,
        query=("access_scope",),
    ),
    Endpoint(
        "PUT",
        f"{_SESSIONS}/{{session}}/project",
        assign_project,
        "Put the session and its runs into a project",
        body=ProjectRequest,
    ),
    Endpoint(
        "GET", f"{_SESSIONS}/{{session}}/trace_export", export_trace, "Refused: no traces are kept"
    ),
    Endpoint("GET", "/api/v1/auth/apikey/me", get_key, "The key that the request carries", ApiKey),
    Endpoint("DELETE", "/api/v1/auth/apikey/me", delete_key, "Refused: the key is the home's file"),
    Endpoint("GET", "/api/v1/audit", _refusal("audit log"), "404: the hosted service's"),
    Endpoint(
        "GET", "/api/v1/billing/usage/events", _refusal("billing"), "404: the hosted service's"
    ),
    Endpoint(
        "GET",
        "/api/v1/billing/usage/checkpoints/current",
        _refusal("billing"),
        "404: the hosted service's",
    ),
]
