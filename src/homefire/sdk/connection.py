"""Calls to the control plane: key headers, retries, and errors that show the server's words."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

import httpx
import msgspec

from homefire.sdk.progress import Progress
from homefire.sdk.waiting import TRANSIENT, Waiter

Json = dict[str, Any]

_MAX_DELAY_S = 30.0
READ_TIMEOUT_S = 30.0
"""For a GET; the server holds the GET of something in transition for up to 20 s."""
WRITE_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Patience:
    """For how long one call is repeated on 408, 429, 5xx and broken connections."""

    total_s: float = 300.0
    first_contact_s: float = 10.0
    """Instead of `total_s` while this connection never got any answer: most likely nothing runs
    at that address, and the user should hear it soon."""


ASK_ONCE = Patience(total_s=0.0, first_contact_s=0.0)
"""For polls, which repeat themselves."""


class Connection:
    """One server and one key. Thread-safe; every call blocks.

    Closes its sockets when it is garbage collected, or at `close()`.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str,
        *,
        headers: Mapping[str, str] | None = None,
        verify: bool = True,
        waiter: Waiter | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.base_url = base_url
        self._waiter = waiter or Waiter()
        self._answered = False
        self._client = httpx.Client(
            headers={"X-Api-Key": api_key, "Content-Type": "application/json", **(headers or {})},
            verify=verify,
            transport=transport,
            limits=httpx.Limits(max_connections=64, max_keepalive_connections=16),
        )
        self.close = weakref.finalize(self, self._client.close)

    def call(self, method: str, path: str, **options: Any) -> Json:
        """The JSON object that the server answers.

        Options as for `request`. Raises httpx.HTTPStatusError with the server's message on a
        status of 400 and above, and httpx.TransportError when there is no answer.
        """
        response = self.request(method, path, **options)
        raise_for_status(response)
        return json_object(response)

    def request(
        self,
        method: str,
        path: str,
        *,
        body: Json | None = None,
        params: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
        patience: Patience | None = None,
        answers: Container[int] = (),
    ) -> httpx.Response:
        """The last answer, whatever its status.

        `path` may be a whole URL of another plane; `answers` are statuses to return at once
        although they are transient elsewhere.
        """
        url = path if path.startswith("http") else self.base_url + path
        default_s = READ_TIMEOUT_S if method == "GET" else WRITE_TIMEOUT_S
        request = self._client.build_request(
            method,
            url,
            content=None if body is None else msgspec.json.encode(body),
            params=params,
            headers=headers,
            timeout=httpx.Timeout(timeout_s or default_s, connect=5.0),
        )
        return self._send_with_retries(request, patience or Patience(), answers)

    def _send_with_retries(
        self, request: httpx.Request, patience: Patience, answers: Container[int]
    ) -> httpx.Response:
        clock = self._waiter.clock
        started = clock.monotonic()
        attempt = 0
        with Progress(f"{request.method} {request.url.path}", clock=clock) as progress:
            while True:
                outcome = self._send(request)
                budget_s = patience.total_s if self._answered else patience.first_contact_s
                delay_s = _delay_s(outcome, attempt)
                is_over = clock.monotonic() - started + delay_s > budget_s
                if isinstance(outcome, httpx.Response):
                    if is_over or not _is_transient(outcome, answers):
                        return outcome
                    progress.update(f"HTTP {outcome.status_code}: {error_text(outcome)}")
                elif is_over:
                    raise _explained(outcome, request) from outcome
                else:
                    progress.update(f"no answer ({type(outcome).__name__}), trying again")
                self._waiter.sleep(delay_s)
                attempt += 1

    def _send(self, request: httpx.Request) -> httpx.Response | httpx.TransportError:
        try:
            response = self._client.send(request)
        except httpx.TransportError as exc:
            return exc
        self._answered = True
        return response


def held_timeout_s(progress: Progress) -> float:
    """Read timeout of a GET that the server may hold: never far beyond the end of the wait."""
    return min(READ_TIMEOUT_S, progress.left_s + 1.0)


def raise_for_status(response: httpx.Response) -> None:
    """httpx.HTTPStatusError whose text is what the server said."""
    if response.is_error:
        request = response.request
        message = (
            f"{request.method} {request.url.path}: "
            f"HTTP {response.status_code}: {error_text(response)}"
        )
        raise httpx.HTTPStatusError(message, request=request, response=response)


def error_text(response: httpx.Response) -> str:
    """The server's message: `error.message`, `message`, `detail`, or the body's beginning."""
    return message_of(response.content) or response.reason_phrase


def message_of(content: bytes) -> str:
    with contextlib.suppress(msgspec.DecodeError):
        body = msgspec.json.decode(content)
        error = body.get("error", body) if isinstance(body, dict) else body
        if isinstance(error, dict):
            for key in ("message", "detail"):
                if error.get(key):
                    return str(error[key])
        if isinstance(error, str):
            return error
    return content[:500].decode(errors="replace").strip()


def json_object(response: httpx.Response) -> Json:
    where = f"{response.request.method} {response.request.url.path}"
    try:
        return msgspec.json.decode(response.content or b"{}", type=Json)
    except msgspec.DecodeError as exc:
        raise RuntimeError(
            f"{where} answered no JSON object: {response.text[:200]!r}; "
            "is base_url really a homefire or Fireworks server?"
        ) from exc


def _is_transient(response: httpx.Response, answers: Container[int]) -> bool:
    return response.status_code in TRANSIENT and response.status_code not in answers


def _delay_s(outcome: httpx.Response | httpx.TransportError, attempt: int) -> float:
    if isinstance(outcome, httpx.Response):
        asked = outcome.headers.get("retry-after", "")
        if asked.isdigit():
            return min(float(asked), _MAX_DELAY_S)
    return min(0.25 * 2.0**attempt, _MAX_DELAY_S)


def _explained(exc: httpx.TransportError, request: httpx.Request) -> httpx.TransportError:
    root = f"{request.url.scheme}://{request.url.netloc.decode()}"
    hint = f"is the server up? `homefire up` starts one, base_url or FIREWORKS_BASE_URL names it ({root})"
    return type(exc)(f"{request.method} {request.url}: {exc}; {hint}", request=request)
