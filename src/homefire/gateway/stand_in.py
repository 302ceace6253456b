"""What the gateway answers in place of a trainer front that is down, starting or gone. Pure.

The clients retry 5xx on a future for ever and 5xx on a call for minutes, so a state that no waiting
changes is a failed future (200 with `error`) or a 400; everything else asks the client to wait.
"""

from __future__ import annotations

from typing import Any

import msgspec

from homefire.wire.errors import FailedPrecondition, Unavailable
from homefire.wire.internal import TrainerRoute
from homefire.wire.resources import JobState

_ENDED = frozenset(
    {
        JobState.FAILED,
        JobState.CANCELLING,
        JobState.CANCELLED,
        JobState.COMPLETED,
        JobState.EARLY_STOPPED,
        JobState.EXPIRED,
        JobState.IDLE,
        JobState.DELETING,
        JobState.DELETING_CLEANING_UP,
        JobState.DELETED,
        JobState.ARCHIVED,
    }
)
"""States in which no front comes back by itself; a paused one is woken by the request."""

Answer = tuple[int, dict[str, Any]]
"""Status and JSON body."""


class _FutureBody(msgspec.Struct):
    request_id: str = ""


def is_ended(route: TrainerRoute) -> bool:
    return route.upstream is None and route.state in _ENDED


def answer(
    operation: str, job: str, route: TrainerRoute, *, body: bytes = b"", reason: str = ""
) -> Answer:
    """The stand-in's words for `operation` of `job`. Raises Unavailable, FailedPrecondition.

    Example: `(408, {"type": "try_again", "request_id": "job-1.8d", "queue_state": …})`.
    """
    if is_ended(route):
        return _answer_ended(operation, job, route)
    if operation == "session_heartbeat":
        return 200, {"type": "session_heartbeat"}
    if operation == "telemetry":
        return 200, {"status": "accepted"}
    if operation == "retrieve_future":
        return 408, {
            "type": "try_again",
            "request_id": _request_id(body),
            "queue_state": "paused_capacity",
            "queue_state_reason": _why_down(job, route),
        }
    raise Unavailable(
        f"{_why_down(job, route)} ({reason})" if reason else _why_down(job, route),
        hint="retry in a second; nothing that was acknowledged is lost",
    )


def _answer_ended(operation: str, job: str, route: TrainerRoute) -> Answer:
    text = f"trainer job {job!r} is in state {route.state}{_because(route)}"
    if operation == "retrieve_future":
        return 200, {"error": text, "category": "server", "error_class": FailedPrecondition.code}
    if operation == "healthz":
        raise Unavailable(text)
    raise FailedPrecondition(
        text,
        hint="resume it with `POST …:resume` or TrainerJobManager.reconnect_and_wait; a model that is"
        " created at the root starts its trainer again",
    )


def _why_down(job: str, route: TrainerRoute) -> str:
    doing = "is restarting" if route.state == JobState.RUNNING else f"is in state {route.state}"
    return f"the trainer of job {job!r} {doing}{_because(route)}"


def _because(route: TrainerRoute) -> str:
    return f": {route.detail}" if route.detail else ""


def _request_id(body: bytes) -> str:
    try:
        return msgspec.json.decode(body, type=_FutureBody).request_id
    except msgspec.MsgspecError:
        return ""
