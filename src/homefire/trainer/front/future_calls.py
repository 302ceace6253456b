"""What clients get for a request id: the result, how large it is, why it failed, or `try_again`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response

from homefire.foundation.failpoints import failpoint
from homefire.http.bodies import json_response, read_json
from homefire.trainer.front.records import FailedResult, PassResult, PlainResult, Result
from homefire.trainer.front.service import Front
from homefire.wire import tinker, tinker_proto
from homefire.wire.errors import ErrorRecord, NotFound, Unsupported
from homefire.wire.internal import TrainerState

POLL_S = 35.0
"""How long a future is held; clients give up at 45 s."""
PAUSED_POLL_S = 5.0
"""Shorter while nothing runs, so that the reason reaches the client."""
INLINE_BYTES = 1 << 20
"""A client that asks for it gets the size of a larger result first, and makes room."""
OFF_LOOP_ABOVE = 100_000
"""Bytes; decoding 1 MB takes milliseconds, in which no heartbeat would be answered."""
Value = TypeVar("Value")


class FutureCalls:
    def __init__(self, front: Front) -> None:
        self._front = front

    async def retrieve_future(self, request: Request) -> Response:
        body = await read_json(request, tinker.RetrieveFuture)
        request_id, futures = body.request_id, self._front.futures
        if futures.is_pending(request_id):
            await self._hold(futures.completion(request_id))
        result = futures.read(request_id)
        if result is not None:
            failpoint("front.before_result")
            answer = await _answer(result, request.headers.get("accept", ""))
            is_large = len(answer.body) > INLINE_BYTES
            return _only_size(answer) if is_large and body.allow_metadata_only else answer
        if futures.is_pending(request_id):
            return self._not_yet(request_id)
        return _failure(ErrorRecord.of(_unknown(request_id)))

    async def cancel_future(self, request: Request) -> Response:
        """Only samples are cancelled: without one of its requests, a model's order has a hole."""
        body = await read_json(request, tinker.CancelFuture)
        if not self._front.futures.is_known(body.request_id):
            raise _unknown(body.request_id)
        raise Unsupported(
            f"cancel_future: {body.request_id} is a training request, which runs in its order",
            hint="let it finish; gradients that are not wanted go with the next failed or zero step",
            field="request_id",
        )

    async def _hold(self, completion: asyncio.Event) -> None:
        """Until there is a result, the front closes, or it is time to say that there is none yet."""
        if self._front.status.state is TrainerState.FAILED:
            return
        hold_s = PAUSED_POLL_S if self._front.status.pause_reason else POLL_S
        waits = [asyncio.ensure_future(e.wait()) for e in (completion, self._front.closing)]
        try:
            await asyncio.wait(waits, timeout=hold_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    def _not_yet(self, request_id: str) -> Response:
        status = self._front.status
        if status.state is TrainerState.FAILED and status.error is not None:
            return _failure(status.error)
        body = {"type": "try_again", "request_id": request_id, "queue_state": "active"}
        if status.pause_reason:
            body |= {"queue_state": "paused_capacity", "queue_state_reason": status.pause_reason}
        return json_response(body, status=408)


def promise(request_id: str, model: str | None = None) -> Response:
    """The answer to a call whose result comes later."""
    body = {"request_id": request_id}
    return json_response(body if model is None else {**body, "model_id": model})


async def off_loop(call: Callable[[], Value], num_bytes: int) -> Value:
    return await asyncio.to_thread(call) if num_bytes > OFF_LOOP_ABOVE else call()


async def _answer(result: Result, accept: str) -> Response:
    match result:
        case FailedResult(error):
            return _failure(error)
        case PlainResult(body):
            return json_response(body)
        case PassResult(output):
            return await _answer_pass(output, binary=tinker_proto.CONTENT_TYPE in accept)


async def _answer_pass(output: tinker.PassOutput, *, binary: bool) -> Response:
    encode, kind = tinker.output_json, "application/json"
    if binary:
        encode, kind = tinker_proto.encode_output, tinker_proto.CONTENT_TYPE
    return Response(await off_loop(lambda: encode(output), output.size_bytes), media_type=kind)


def _only_size(answer: Response) -> Response:
    return json_response({"status": "complete_metadata", "response_payload_size": len(answer.body)})


def _failure(error: ErrorRecord) -> Response:
    """A failed future is an answer, not an HTTP error: clients retry those for ever."""
    body = {
        "error": str(error.exception()),
        "category": error.category,
        "error_class": error.code,
        "code": error.code,
        "hint": error.hint,
    }
    return json_response(body)


def _unknown(request_id: str) -> NotFound:
    return NotFound(
        f"no result for request {request_id!r}",
        hint="it was never accepted here, or its result is past its retention",
        field="request_id",
    )
