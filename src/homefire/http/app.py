"""The shell of a service: request ids, the service secret, and errors as one kind of body.

Authentication is default deny: `ServiceShell` wraps the whole application, so a route cannot forget it.
"""

from __future__ import annotations

import hmac
import logging
import re
import secrets
from collections.abc import Sequence

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Lifespan, Message, Receive, Scope, Send

from homefire.http.bodies import json_response
from homefire.wire.errors import (
    HomefireError,
    InternalError,
    InvalidArgument,
    NotFound,
    Unauthenticated,
    error_body,
)
from homefire.wire.internal import ACCOUNT_HEADER, REQUEST_ID_HEADER, SECRET_HEADER

log = logging.getLogger(__name__)
_REQUEST_ID = re.compile(r"^[A-Za-z0-9._:-]{1,128}$")


def service_app(
    routes: Sequence[BaseRoute], *, secret: str, lifespan: Lifespan[Starlette] | None = None
) -> ASGIApp:
    """A Starlette application that only answers callers who know `secret`."""
    app = Starlette(
        routes=list(routes),
        lifespan=lifespan,
        exception_handlers={
            HomefireError: answer_error,
            HTTPException: answer_error,
            Exception: answer_error,
        },
    )
    return ServiceShell(app, secret=secret)


class ServiceShell:
    """ASGI middleware: checks the secret, gives every request an id and echoes it."""

    def __init__(self, app: ASGIApp, *, secret: str) -> None:
        self._app = app
        self._secret = secret.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["state"] = dict(scope.get("state", {}))
        request = Request(scope)
        request.state.request_id = request_id_of(request)
        given = request.headers.get(SECRET_HEADER, "").encode()
        if not hmac.compare_digest(given, self._secret):
            error = Unauthenticated(f"{SECRET_HEADER} is missing or wrong")
            await respond(request, error)(scope, receive, send)
            return

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message.get("headers", []),
                    (REQUEST_ID_HEADER.encode(), scope["state"]["request_id"].encode()),
                ]
            await send(message)

        await self._app(scope, receive, send_with_id)


def request_id_of(request: Request) -> str:
    """The caller's request id when it is a sane one, else a fresh one."""
    known = getattr(request.state, "request_id", None)
    given = known or request.headers.get(REQUEST_ID_HEADER, "")
    return given if _REQUEST_ID.match(given) else secrets.token_hex(16)


def account_of(request: Request) -> str:
    """The account that the gateway authenticated."""
    account = request.headers.get(ACCOUNT_HEADER, "")
    if not account:
        raise Unauthenticated(f"{ACCOUNT_HEADER} is missing")
    return account


async def answer_error(request: Request, exc: Exception) -> Response:
    """The only place where an exception becomes a response."""
    status = exc.status_code if isinstance(exc, HTTPException) else None  # 405 keeps its own
    return respond(request, _translate(request, exc), status=status)


def respond(request: Request, error: HomefireError, *, status: int | None = None) -> Response:
    """`status` when it is not the error's usual one."""
    request_id = request_id_of(request)
    status = status or error.http_status
    headers = {"retry-after": "1"} if status in {429, 503} else None
    return json_response(error_body(error, request_id=request_id), status=status, headers=headers)


def _translate(request: Request, exc: Exception) -> HomefireError:
    if isinstance(exc, HomefireError):
        return exc
    if isinstance(exc, HTTPException):
        where = f"{request.method} {request.url.path}"
        if exc.status_code == 404:
            return NotFound(f"no route {where}")
        return InvalidArgument(f"{where}: {exc.detail}")
    if isinstance(exc, ClientDisconnect):
        return InvalidArgument("the client went away")
    log.error("request %s failed", request_id_of(request), exc_info=exc)
    return InternalError(f"{type(exc).__name__}: {exc}", hint="see the service's log")
