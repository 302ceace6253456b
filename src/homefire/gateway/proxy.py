"""Sends a caller's request to a service and streams the answer back, byte for byte."""

from __future__ import annotations

import logging

import aiohttp
from starlette.requests import ClientDisconnect
from yarl import URL

from homefire.gateway.caller import Caller
from homefire.gateway.upstreams import Upstreams
from homefire.wire.internal import ACCOUNT_HEADER, REQUEST_ID_HEADER, SECRET_HEADER
from homefire.wire.specs import Upstream

log = logging.getLogger(__name__)

_HOP_BY_HOP = frozenset(
    {
        "connection",
        "expect",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
_NOT_FORWARDED = _HOP_BY_HOP | {"host", "authorization", "x-api-key", "cookie", REQUEST_ID_HEADER}
_NOT_RETURNED = frozenset(
    name.encode() for name in _HOP_BY_HOP | {"date", "server", REQUEST_ID_HEADER}
)
_ANSWERED_IN_ONE_PIECE_BELOW = 64 << 10


class UpstreamDown(Exception):
    """No connection could be made: nothing was sent, so the request may go elsewhere or again."""


class UpstreamLost(Exception):
    """The connection broke before an answer began: the service may have acted on the request."""


class Proxy:
    def __init__(self, upstreams: Upstreams) -> None:
        self._upstreams = upstreams

    async def forward(self, caller: Caller, upstream: Upstream, target: str) -> None:
        """Answers `caller` with what `upstream` says to `target`. Raises UpstreamDown, UpstreamLost.

        A connection that breaks after the answer began ends the client's connection too, since
        a truncated answer must not look complete.
        """
        await caller.body.begin()
        in_flight = self._upstreams.in_flight
        in_flight[upstream.socket] += 1
        try:
            response = await self._send(caller, upstream, target)
            try:
                await _return(caller, response)
            finally:
                response.close()
        finally:
            in_flight[upstream.socket] -= 1

    async def _send(
        self, caller: Caller, upstream: Upstream, target: str
    ) -> aiohttp.ClientResponse:
        session = self._upstreams.session(upstream)
        try:
            return await session.request(
                caller.method,
                URL(f"http://service{target}", encoded=True),
                headers=_forwarded_headers(caller, upstream),
                data=caller.body.outgoing() or None,
                allow_redirects=False,
            )
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as exc:
            raise UpstreamDown(str(exc)) from exc
        except (aiohttp.ClientError, OSError) as exc:
            if isinstance(exc.__cause__, ClientDisconnect):
                raise ClientDisconnect from exc
            raise UpstreamLost(f"{type(exc).__name__}: {exc}") from exc


def _forwarded_headers(caller: Caller, upstream: Upstream) -> list[tuple[str, str]]:
    kept = [
        (name, value)
        for name, value in caller.headers.items()
        if name not in _NOT_FORWARDED and not name.startswith("x-homefire-")
    ]
    return [
        *kept,
        (SECRET_HEADER, upstream.secret),
        (ACCOUNT_HEADER, caller.account),
        (REQUEST_ID_HEADER, caller.request_id),
    ]


async def _return(caller: Caller, response: aiohttp.ClientResponse) -> None:
    headers = [
        (name.lower(), value)
        for name, value in response.raw_headers
        if name.lower() not in _NOT_RETURNED
    ]
    length = response.content_length
    if length is not None and length < _ANSWERED_IN_ONE_PIECE_BELOW:
        await _return_whole(caller, response, headers)
    else:
        await _return_stream(caller, response, headers)


async def _return_whole(
    caller: Caller, response: aiohttp.ClientResponse, headers: list[tuple[bytes, bytes]]
) -> None:
    try:
        content = await response.read()
    except (aiohttp.ClientError, OSError) as exc:
        raise UpstreamLost(f"{type(exc).__name__}: {exc}") from exc
    await caller.start_answer(response.status, headers)
    await caller.send_chunk(content, more=False)


async def _return_stream(
    caller: Caller, response: aiohttp.ClientResponse, headers: list[tuple[bytes, bytes]]
) -> None:
    await caller.start_answer(response.status, headers)
    try:
        async for chunk in response.content.iter_any():
            await caller.send_chunk(chunk, more=True)
    except (aiohttp.ClientError, OSError) as exc:
        log.warning("request %s: the answer broke off: %s", caller.request_id, exc)
        return
    await caller.send_chunk(b"", more=False)
