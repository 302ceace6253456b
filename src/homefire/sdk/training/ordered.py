"""Futures of requests that we send ourselves, beside tinker's."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import httpx
import tinker

from homefire.sdk.connection import Connection, Json, error_text, raise_for_status

Result = TypeVar("Result")
_POLL_TIMEOUT_S = 45.0
"""The server holds a poll for 30 to 40 s."""


class OrderedFuture(tinker.APIFuture[Result]):
    """The future of a request of our own; use it as any tinker future (`.result()` or `await`)."""

    def __init__(self, future: Future[Result]) -> None:
        self._future = future

    def result(self, timeout: float | None = None) -> Result:
        return self._future.result(timeout)

    async def result_async(self, timeout: float | None = None) -> Result:
        async with asyncio.timeout(timeout):
            return await asyncio.wrap_future(self._future)

    def future(self) -> Future[Result]:
        return self._future


def retrieve(connection: Connection, request_id: str) -> Json:
    """The result of an accepted request. Blocks; the server holds each poll.

    tinker.RequestFailedError when the request failed, httpx.HTTPStatusError when it is refused.
    """
    body = {"request_id": request_id, "allow_metadata_only": False}
    while True:
        response = connection.request(
            "POST",
            "/api/v1/retrieve_future",
            body=body,
            timeout_s=_POLL_TIMEOUT_S,
            answers=frozenset({httpx.codes.REQUEST_TIMEOUT}),
        )
        if response.status_code == httpx.codes.REQUEST_TIMEOUT:
            continue
        raise_for_status(response)
        answer: Json = response.json()
        if "error" in answer:
            raise tinker.RequestFailedError(
                error_text(response), request_id, answer.get("category", "unknown")
            )
        if answer.get("type") != "try_again":
            return answer


def in_thread(work: Callable[[], Result]) -> Future[Result]:
    """The future of `work`, run in a daemon thread, which does not hold up the end of a script."""
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as exc:  # noqa: BLE001  # the future carries it to its reader
            future.set_exception(exc)

    future.set_running_or_notify_cancel()
    threading.Thread(target=run, name="homefire-load", daemon=True).start()
    return future
