"""Calls from one of our services to another, over its Unix socket."""

from __future__ import annotations

from typing import Any, TypeVar

import httpx
import msgspec

from homefire.wire.errors import HomefireError, InternalError, Unavailable, error_of_body
from homefire.wire.internal import REQUEST_ID_HEADER, SECRET_HEADER
from homefire.wire.specs import Upstream

Answer = TypeVar("Answer")


class ServiceClient:
    """One upstream service. Raises the HomefireError that the service raised, or `Unavailable`.

    `transport` stands in for the socket, e.g. `httpx.ASGITransport` for a service in this process.
    """

    def __init__(
        self,
        upstream: Upstream,
        *,
        timeout_s: float = 30.0,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._client = httpx.AsyncClient(
            transport=transport or httpx.AsyncHTTPTransport(uds=upstream.socket),
            base_url="http://service",
            headers={SECRET_HEADER: upstream.secret},
            timeout=httpx.Timeout(timeout_s, connect=5.0),
        )

    async def get(self, path: str, kind: type[Answer], **query: Any) -> Answer:
        return await self._call("GET", path, kind, params=query)

    async def post(
        self, path: str, body: Any, kind: type[Answer], *, request_id: str = ""
    ) -> Answer:
        headers = {"content-type": "application/json"}
        if request_id:
            headers[REQUEST_ID_HEADER] = request_id
        content = msgspec.json.encode(body)
        return await self._call("POST", path, kind, content=content, headers=headers)

    async def close(self) -> None:
        await self._client.aclose()

    async def _call(self, method: str, path: str, kind: type[Answer], **options: Any) -> Answer:
        try:
            response = await self._client.request(method, path, **options)
        except (httpx.TransportError, OSError) as exc:
            raise Unavailable(f"{method} {path}: the service does not answer ({exc})") from exc
        if response.is_error:
            raise _error_of(response)
        return msgspec.json.decode(response.content, type=kind)


def _error_of(response: httpx.Response) -> HomefireError:
    try:
        return error_of_body(msgspec.json.decode(response.content))
    except (msgspec.DecodeError, KeyError, TypeError):
        return InternalError(f"HTTP {response.status_code}: {response.text[:500]}")
