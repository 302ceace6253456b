"""Calls of the protocol that a trainer does not answer: each is refused by its name, with what to do."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from homefire.http.bodies import read_body
from homefire.trainer.front.admission import Admission
from homefire.trainer.front.future_calls import promise
from homefire.wire.errors import Unsupported

_SAMPLE_ELSEWHERE = "sample through a deployment, or with a sampling client at the server's root"
REFUSED_CALLS = {
    "create_sampling_session": _SAMPLE_ELSEWHERE,
    "asample": _SAMPLE_ELSEWHERE,
    "join_sampling_session": _SAMPLE_ELSEWHERE,
    "retrieve_futures": "poll retrieve_future for each request; client/config leaves "
    "sample_use_retrieve_futures off",
}
"""POST; what to do instead."""


async def refuse_call(request: Request) -> Response:
    await read_body(request)
    call = request.url.path.removeprefix("/api/v1/").partition("/")[0]
    raise Unsupported(
        f"{call}: a trainer does not sample", hint=REFUSED_CALLS.get(call, _SAMPLE_ELSEWHERE)
    )


async def refuse_custom_loss(request: Request, admission: Admission) -> Response:
    """A call that has a future, which fails."""
    await read_body(request)
    error = Unsupported(
        "create_custom_loss: losses are not traced to the server by this version",
        hint="use forward_backward_custom with the loss as a function; it runs on the client",
        field="graph",
    )
    return promise(admission.fail_now(error))
