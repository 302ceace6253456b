"""Root requests that a trainer answers, and what is said while it is down, parked or waits for room.

The clients retry a 5xx of a future for ever and give up at once on 404 and 410, so a training future
is answered with 408 while waiting may help, and with a failed result when it cannot.
"""

from __future__ import annotations

from typing import Any

import aiohttp
import msgspec

from homefire.gateway import stand_in
from homefire.gateway.caller import Caller
from homefire.gateway.control_calls import ControlCalls
from homefire.gateway.envelope import Envelope
from homefire.gateway.promises import (
    LARGEST_CREATION_BYTES,
    Creation,
    creation_promise,
    promised_creation,
)
from homefire.gateway.proxy import UpstreamDown, UpstreamLost
from homefire.gateway.trainers import Trainers
from homefire.gateway.upstreams import Upstreams
from homefire.http.bodies import MAX_BODY_BYTES
from homefire.wire.errors import (
    ErrorRecord,
    HomefireError,
    InternalError,
    InvalidArgument,
    Unavailable,
    from_code,
)
from homefire.wire.internal import ACCOUNT_HEADER, SECRET_HEADER, NewRun
from homefire.wire.pooled import sampler_id, service_of
from homefire.wire.resources import JobState
from homefire.wire.specs import Upstream

SMALL_BODY_BYTES = 1 << 20
_EPHEMERAL_SAVE = "save_weights_for_sampler"


class RootTrainers:
    def __init__(self, trainers: Trainers, calls: ControlCalls, upstreams: Upstreams) -> None:
        self._trainers = trainers
        self._calls = calls
        self._upstreams = upstreams

    async def create(self, caller: Caller, operation: str, envelope: Envelope) -> None:
        """`create_model`, or `load_weights` that creates. What can be refused is refused by control."""
        body = await caller.body.read(max_bytes=SMALL_BODY_BYTES)
        place = await self._calls.place(_new_run(caller.account, envelope))
        try:
            await self._forward(caller, operation, place.job)
        except (UpstreamDown, UpstreamLost) as exc:
            if self._is_ended(caller, place.job) or not _fits_into_promise(caller, body):
                await self._stand_in(caller, operation, place.job, reason=str(exc))
            else:
                promise = creation_promise(place.job, Creation(operation, body))
                await caller.answer_json({"request_id": promise, "model_id": place.run})

    async def operate(self, caller: Caller, operation: str, envelope: Envelope) -> None:
        """An operation on a run, which its envelope names."""
        if not envelope.model_id:
            raise InvalidArgument(f"{operation} names no model_id", field="model_id")
        job = await self._calls.job_of(caller.account, envelope.model_id)
        try:
            await self._forward(caller, operation, job)
        except (UpstreamDown, UpstreamLost) as exc:
            await self._stand_in(caller, operation, job, reason=str(exc))
        else:
            if operation == _EPHEMERAL_SAVE and envelope.path is None:
                # It is sampled next, so its sampler may start while the trainer saves.
                self._calls.wake_soon(caller.account, sampler_id(job))

    async def retrieve(self, caller: Caller, request_id: str) -> None:
        try:
            await self._retrieve(caller, request_id)
        except HomefireError as error:
            await caller.answer_json(_failed(error))

    async def _retrieve(self, caller: Caller, request_id: str) -> None:
        job = service_of(request_id)
        try:
            if (creation := promised_creation(request_id)) is not None:
                await self._redeem(caller, job, creation)
            await self._forward(caller, "retrieve_future", job)
        except (UpstreamDown, UpstreamLost, Unavailable) as exc:
            await self._stand_in(caller, "retrieve_future", job, reason=str(exc))

    async def _forward(self, caller: Caller, operation: str, job: str) -> None:
        route = await self._trainers.current_route(caller.account, job)
        if route.upstream is None and route.state == JobState.PAUSED:
            await self._calls.wake(caller.account, job)
            await self._trainers.current_route(caller.account, job)
        await self._trainers.forward(
            caller, operation, caller.target, account=caller.account, job=job
        )

    async def _stand_in(self, caller: Caller, operation: str, job: str, *, reason: str) -> None:
        route = self._trainers.route(caller.account, job)
        body = await caller.body.read(max_bytes=MAX_BODY_BYTES)
        status, answer = stand_in.answer(operation, job, route, body=body, reason=reason)
        await caller.answer_json(answer, status=status)

    def _is_ended(self, caller: Caller, job: str) -> bool:
        return stand_in.is_ended(self._trainers.route(caller.account, job))

    async def _redeem(self, caller: Caller, job: str, creation: Creation) -> None:
        """Hands the promised creation to its trainer, and asks on for what that promises.

        Every poll does so again: to control and to the trainer the same model is the same model.
        """
        envelope = _decoded_envelope(creation.body)
        place = await self._calls.place(_new_run(caller.account, envelope))
        if place.job != job:
            raise InvalidArgument(f"{place.run} is not trained by {job}", field="request_id")
        upstream = (await self._trainers.current_route(caller.account, job)).upstream
        if upstream is None:
            raise UpstreamDown("its trainer has not begun yet")
        request_id = await self._hand_over(caller.account, upstream, creation)
        poll = msgspec.json.decode(
            await caller.body.read(max_bytes=SMALL_BODY_BYTES), type=dict[str, Any]
        )
        caller.replace_body(msgspec.json.encode({**poll, "request_id": request_id}))

    async def _hand_over(self, account: str, upstream: Upstream, creation: Creation) -> str:
        headers = {
            "content-type": "application/json",
            SECRET_HEADER: upstream.secret,
            ACCOUNT_HEADER: account,
        }
        try:
            async with self._upstreams.session(upstream).post(
                f"http://service/api/v1/{creation.operation}", data=creation.body, headers=headers
            ) as response:
                content = await response.read()
        except (aiohttp.ClientError, OSError) as exc:
            raise UpstreamDown(f"{type(exc).__name__}: {exc}") from exc
        return _promised_id(content)


def _fits_into_promise(caller: Caller, body: bytes) -> bool:
    return len(body) <= LARGEST_CREATION_BYTES and "content-encoding" not in caller.headers


def _new_run(account: str, envelope: Envelope) -> NewRun:
    if envelope.session_id is None or envelope.model_seq_id is None:
        raise InvalidArgument(
            "the request names no session_id and model_seq_id", field="session_id"
        )
    lora = envelope.lora_config
    return NewRun(
        account=account,
        session_id=envelope.session_id,
        model_seq_id=envelope.model_seq_id,
        base_model=envelope.base_model,
        path=envelope.path,
        rank=lora.rank if lora else None,
        user_metadata=_texts(envelope.user_metadata or {}),
    )


def _texts(metadata: dict[str, Any]) -> dict[str, str]:
    return {
        name: value if isinstance(value, str) else msgspec.json.encode(value).decode()
        for name, value in metadata.items()
    }


def _decoded_envelope(body: bytes) -> Envelope:
    try:
        return msgspec.json.decode(body, type=Envelope)
    except msgspec.MsgspecError as exc:
        raise InvalidArgument(f"the request id holds no request: {exc}") from exc


class _Promise(msgspec.Struct):
    request_id: str


class _Refusal(msgspec.Struct):
    class Error(msgspec.Struct):
        code: str
        message: str
        hint: str = ""

    error: Error


def _promised_id(content: bytes) -> str:
    """Raises the error that the trainer answered with instead."""
    try:
        return msgspec.json.decode(content, type=_Promise).request_id
    except msgspec.MsgspecError:
        pass
    try:
        error = msgspec.json.decode(content, type=_Refusal).error
    except msgspec.MsgspecError as exc:
        raise InternalError(f"the trainer answered {content[:200]!r}") from exc
    raise from_code(error.code, error.message, hint=error.hint)


def _failed(error: HomefireError) -> dict[str, Any]:
    """A failed future, as the trainer's own."""
    record = ErrorRecord.of(error)
    return {"error": str(error), "category": record.category, "error_class": record.code}
