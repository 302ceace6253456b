"""What every request passes before a route is looked at: request id, host, path, key.

Default deny: the shell wraps the whole application, so that no route can forget it. Three paths need
no user's key: `/healthz`, which tells nothing, `/internal/…`, which needs the gateway's secret, and
reads of `/api/v1/downloads/…`, which act for no account: control checks the signature in the path.
"""

from __future__ import annotations

import hmac
import logging
from collections.abc import Awaitable, Callable, Sequence

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from homefire.gateway.hosts import HostList
from homefire.gateway.keys import account_of_key, given_key
from homefire.http.app import request_id_of, respond
from homefire.wire.errors import HomefireError, InvalidArgument, Unauthenticated, Unavailable
from homefire.wire.internal import DOWNLOADS_PATH, REQUEST_ID_HEADER, SECRET_HEADER, KeyRoute

log = logging.getLogger(__name__)
Keys = Sequence[KeyRoute]


class GatewayShell:
    """ASGI middleware. Sets `account` and `request_id` in the scope's state, and echoes the id."""

    def __init__(
        self, app: ASGIApp, *, secret: str, hosts: HostList, keys: Callable[[], Awaitable[Keys]]
    ) -> None:
        self._app = app
        self._secret = secret.encode()
        self._hosts = hosts
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["state"] = {**scope.get("state", {}), "account": ""}
        request = Request(scope)
        request_id = request.state.request_id = request_id_of(request)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message.get("headers", []),
                    (REQUEST_ID_HEADER.encode(), request_id.encode()),
                ]
                if message["status"] >= 400:
                    log.info(
                        "request %s: %s %r -> %d",
                        request_id, scope["method"], scope["path"], message["status"],
                    )  # fmt: skip
            await send(message)

        try:
            scope["state"]["account"] = await self._admit(request)
        except HomefireError as error:
            await respond(request, error)(scope, receive, send_with_id)
            return
        await self._app(scope, receive, send_with_id)

    async def _admit(self, request: Request) -> str:
        """The caller's account; empty for the kinds of path that act for nobody."""
        self._hosts.check(request.headers.get("host", ""))
        path = request.url.path
        if any(segment in {".", ".."} for segment in path.split("/")):
            raise InvalidArgument(f"the path {path!r} has a dot segment", hint="write the path out")
        if path == "/healthz":
            return ""
        if path.startswith("/internal/"):
            self._check_secret(request)
            return ""
        if path.startswith(f"{DOWNLOADS_PATH}/") and request.method in {"GET", "HEAD"}:
            return ""
        return await self._account(request)

    async def _account(self, request: Request) -> str:
        key = given_key(request.headers)
        if not key:
            raise Unauthenticated(
                "the request has no API key",
                hint="send it as 'X-API-Key: KEY' or 'Authorization: Bearer KEY'; "
                "`homefire env` prints the key",
            )
        keys = await self._keys()
        if not keys:
            raise Unavailable(
                "the gateway has not heard from control yet", hint="retry in a second"
            )
        account = account_of_key(key, keys)
        if account is None:
            raise Unauthenticated(
                "the API key is unknown", hint="`homefire env` prints the key of this home"
            )
        return account

    def _check_secret(self, request: Request) -> None:
        given = request.headers.get(SECRET_HEADER, "").encode()
        if not hmac.compare_digest(given, self._secret):
            raise Unauthenticated(f"{SECRET_HEADER} is missing or wrong")
