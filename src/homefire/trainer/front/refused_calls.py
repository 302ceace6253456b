"""Calls of the protocol that a trainer does not answer: each is refused by its name, with what to do."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from homefire.http.bodies import read_body
from homefire.trainer.front.admission import Admission
from homefire.trainer.front.future_calls import promise
from homefire.wire.errors import Unsupported

_NO_SAMPLING = (
    "a trainer does not sample",
    "sample through a deployment, or with a sampling client at the server's root",
)
REFUSED_CALLS = {
    "create_sampling_session": _NO_SAMPLING,
    "asample": _NO_SAMPLING,
    "join_sampling_session": _NO_SAMPLING,
    "retrieve_futures": (
        "futures are not retrieved together",
        "poll retrieve_future for each request; client/config leaves sample_use_retrieve_futures off",
    ),
    "weight_sync": (
        "weights are not sent over RDMA",
        "save_weights_for_sampler, and hot-load the snapshot into the deployment",
    ),
}
"""POST; why not, and what to do instead."""


async def refuse_call(request: Request) -> Response:
    await read_body(request)
    call = request.url.path.removeprefix("/api/v1/").partition("/")[0]
    reason, hint = REFUSED_CALLS.get(call, _NO_SAMPLING)
    raise Unsupported(f"{call}: {reason}", hint=hint)


async def refuse_custom_loss(request: Request, admission: Admission) -> Response:
    """A call that has a future, which fails."""
    await read_body(request)
    error = Unsupported(
        "create_custom_loss: losses are not traced to the server by this version",
        hint="use forward_backward_custom with the loss as a function; it runs on the client",
        field="graph",
    )
    return promise(admission.fail_now(error))
