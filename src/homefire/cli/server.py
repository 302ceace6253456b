"""The running homefire of a home, as the commands talk to it: HTTP to the gateway, like any client."""

from __future__ import annotations

import json
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
import msgspec

from homefire.foundation.home import Home, read_up_record
from homefire.wire.errors import InternalError, Unavailable, error_of_body

Answer = TypeVar("Answer")
_TIMEOUT_S = 60.0


class Server:
    """Use as a context manager. Raises the error that the service answered, or Unavailable."""

    def __init__(self, home: Home) -> None:
        record = read_up_record(home)
        if record is None:
            raise _not_running(f"no `homefire up` has run on {home.root}", home)
        self._home = home
        self.url = record.url
        self._client = httpx.Client(
            base_url=record.url, headers={"x-api-key": home.api_key()}, timeout=_TIMEOUT_S
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._client.close()

    def account(self) -> str:
        """Resource name of the key's account, e.g. `accounts/local`."""
        return self.get("/v1/accounts", pageSize=1)["accounts"][0]["name"]

    def get(self, path: str, **query: Any) -> Any:
        """The answer as JSON."""
        return json.loads(self._request("GET", path, query))

    def text(self, path: str, **query: Any) -> str:
        return self._request("GET", path, query).decode()

    def get_as(self, kind: type[Answer], path: str, **query: Any) -> Answer:
        return msgspec.json.decode(self._request("GET", path, query), type=kind)

    def list_all(self, path: str, field: str, **query: Any) -> list[dict[str, Any]]:
        """All pages of a list resource."""
        rows: list[dict[str, Any]] = []
        token = ""
        while True:
            page = self.get(path, pageSize=200, pageToken=token, **query)
            rows += page.get(field, [])
            token = page.get("nextPageToken", "")
            if not token:
                return rows

    def delete(self, path: str, **query: Any) -> None:
        self._request("DELETE", path, query)

    def post(self, path: str, body: Any, **query: Any) -> Any:
        return json.loads(self._request("POST", path, query, body))

    def patch(self, path: str, body: Any) -> Any:
        return json.loads(self._request("PATCH", path, {}, body))

    def put(self, path: str, body: Any) -> Any:
        return json.loads(self._request("PUT", path, {}, body))

    def _request(
        self, method: str, path: str, query: dict[str, Any], body: Any | None = None
    ) -> bytes:
        try:
            response = self._client.request(method, path, params=query, json=body)
        except httpx.TransportError as exc:
            raise _not_running(f"nothing answers at {self.url} ({exc})", self._home) from exc
        if response.is_error:
            raise _error_of(response)
        return response.content


def _not_running(message: str, home: Home) -> Unavailable:
    return Unavailable(message, hint=f"start it with `homefire up --home {home.root}`")


def _error_of(response: httpx.Response) -> Exception:
    try:
        return error_of_body(response.json())
    except (json.JSONDecodeError, KeyError, TypeError):
        return InternalError(f"HTTP {response.status_code}: {response.text[:500]}")
