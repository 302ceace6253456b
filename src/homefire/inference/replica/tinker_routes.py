"""The sampling half of the Tinker protocol, as a sampler's replica answers it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from homefire.http.app import respond
from homefire.http.bodies import decode_json, json_response, read_body, read_json
from homefire.inference.replica.replica import Replica
from homefire.inference.replica.reply import Reply
from homefire.inference.replica.tinker_answer import collect
from homefire.inference.replica.tinker_futures import Outcome, SampleFutures, StoredFailure
from homefire.inference.replica.tinker_order import MAX_SAMPLES, SampleOrder, order_sample
from homefire.wire import tinker_proto
from homefire.wire.errors import (
    CanaryMismatch,
    ErrorRecord,
    InvalidArgument,
    NotFound,
    Overloaded,
    Unavailable,
    Unsupported,
    WeightsMismatch,
)
from homefire.wire.internal import ACCOUNT_HEADER, WEIGHTS_HEADER
from homefire.wire.manifest import weights_header
from homefire.wire.pooled import SamplingSession, parse_sampling_session
from homefire.wire.tinker import RetrieveFuture
from homefire.wire.tinker_sampling import (
    CancelFuture,
    SampleOutput,
    SampleRequest,
    SamplingSessionRef,
    sample_json,
    unknown_fields,
)
from homefire.wire.tinker_sampling_proto import encode_sample

POLL_S = 35.0
"""How long a future is held; clients give up at 45 s."""
MAX_SAMPLE_BODY_BYTES = 64 << 20
METADATA_ABOVE_BYTES = 1 << 20
"""A first poll that allows it is told the size of a larger result, so that the client can make room."""
_OFF_LOOP_ABOVE_BYTES = 100_000
_ATTEMPTS = 3
"""Weights can be changed from outside between a turn and an admission; the request then takes another."""


class SamplingRoutes:
    """`POST /api/v1/asample` and what belongs to it."""

    def __init__(self, replica: Replica, *, poll_s: float = POLL_S) -> None:
        self._replica = replica
        self._spec = replica.spec
        self._poll_s = poll_s
        self._last_counter = 0

    @property
    def _futures(self) -> SampleFutures:
        return self._replica.futures

    def routes(self) -> list[Route]:
        posts: dict[str, Callable[[Request], Awaitable[Response]]] = {
            "asample": self.asample,
            "join_sampling_session": self.join_sampling_session,
            "retrieve_future": self.retrieve_future,
            "cancel_future": self.cancel_future,
        }
        return [
            Route(f"/api/v1/{path}", self._checked(call), methods=["POST"])
            for path, call in posts.items()
        ]

    def _checked(
        self, call: Callable[[Request], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        """Another account's deployment does not exist for the caller."""

        async def endpoint(request: Request) -> Response:
            account = request.headers.get(ACCOUNT_HEADER, self._spec.account)
            if account != self._spec.account:
                raise NotFound(f"no deployment {self._spec.deployment!r} in account {account!r}")
            return await call(request)

        return endpoint

    async def asample(self, request: Request) -> Response:
        """Answered before anything is computed. What is wrong with the request fails its future, so that
        clients hear of it once and by name."""
        body = await read_body(request, max_bytes=MAX_SAMPLE_BODY_BYTES)
        asked = await decode_json(body, SampleRequest)
        session = self._session(asked.sampling_session_id)
        number = None if asked.seq_id is None else (session.id, asked.seq_id)
        digest = asked.digest()
        request_id = self._futures.find(number, digest) if number else None
        if request_id is None:
            self._check_load()
            sampling = partial(self._sample, session, asked, unknown_fields(body))
            request_id = self._futures.start(sampling, number, digest)
        num_samples = 1 if asked.num_samples is None else asked.num_samples
        ids = [f"{request_id}.{index}" for index in range(min(num_samples, MAX_SAMPLES))]
        return json_response({"request_id": request_id, "sample_sequence_ids": ids})

    async def join_sampling_session(self, request: Request) -> Response:
        """A number that no other client of the session has, after a restart of the replica either: it
        counts on from the time."""
        asked = await read_json(request, SamplingSessionRef)
        self._session(asked.sampling_session_id)
        now = int(self._replica.clock.now())
        self._last_counter = max(self._last_counter + 1, now)
        return json_response({"client_counter": self._last_counter})

    async def retrieve_future(self, request: Request) -> Response:
        asked = await read_json(request, RetrieveFuture)
        request_id = asked.request_id
        completion = self._futures.completion(request_id)
        if completion is None:
            return self._gone(request, request_id)
        if not completion.is_set():
            await self._hold(completion)
        size_bytes = self._futures.size_bytes(request_id)
        if asked.allow_metadata_only and size_bytes > METADATA_ABOVE_BYTES:
            return json_response(
                {"status": "complete_metadata", "response_payload_size": size_bytes}
            )
        outcome = self._futures.read(request_id)
        if outcome is not None:
            accept = request.headers.get("accept", "")
            if size_bytes < _OFF_LOOP_ABOVE_BYTES:
                return _answer(outcome, accept)
            return await asyncio.to_thread(_answer, outcome, accept)
        if self._futures.completion(request_id) is None:
            return self._gone(request, request_id)
        body = {"type": "try_again", "request_id": request_id, "queue_state": "active"}
        return json_response(body, status=408)

    async def cancel_future(self, request: Request) -> Response:
        asked = await read_json(request, CancelFuture)
        self._futures.cancel(asked.request_id)
        return json_response({})

    def _session(self, session_id: str | None) -> SamplingSession:
        if not session_id:
            raise InvalidArgument(
                "there is no sampling_session_id",
                hint="sample through create_sampling_session",
                field="sampling_session_id",
            )
        session = parse_sampling_session(session_id)
        if session.sampler != self._spec.deployment or not self._spec.samples_job:
            raise NotFound(
                f"{session_id!r} is no sampling session of deployment {self._spec.deployment!r}",
                hint="create one with create_sampling_session",
                field="sampling_session_id",
            )
        return session

    def _check_load(self) -> None:
        """Unavailable before the engine is open; Overloaded at the limit: clients wait and ask again."""
        limit = self._spec.max_queued
        num_waiting = max(self._futures.num_pending, self._replica.engine.load().queued)
        if num_waiting >= limit:
            raise Overloaded(
                f"{num_waiting} samples are waiting, the limit is {limit}",
                hint="retry later, with fewer requests at once",
            )

    async def _sample(
        self, session: SamplingSession, asked: SampleRequest, unknown: list[str]
    ) -> SampleOutput:
        _refuse_unknown(unknown)
        _check_model_path(asked, session)
        order = order_sample(asked, self._replica.tokenizer, self._replica.limits)
        for _ in range(_ATTEMPTS):
            with suppress(WeightsMismatch):
                return await self._generate_or_reload(session, order)
        raise Unavailable(
            f"the sampler's weights were changed from outside {_ATTEMPTS} times",
            hint="do not hot-load into a sampler; sampling sessions load what they need",
        )

    async def _generate_or_reload(
        self, session: SamplingSession, order: SampleOrder
    ) -> SampleOutput:
        """An adapter that did not stand its canary is read again, once."""
        with suppress(CanaryMismatch):
            return await self._generate(session, order)
        return await self._generate(session, order)

    async def _generate(self, session: SamplingSession, order: SampleOrder) -> SampleOutput:
        replica, engine = self._replica, self._replica.engine
        async with replica.session_weights.serving(engine, session) as weights:
            reply = Reply(order.num_samples)
            sequences = order.sequences(replica.tokenizer)
            ticket = engine.submit(sequences, reply, weights=weights)
            try:
                return await collect(reply, order, session)
            finally:
                if not reply.is_done:
                    engine.cancel(ticket)

    async def _hold(self, completion: asyncio.Event) -> None:
        """Until the request has ended, the replica stops, or it is time to say that it has not."""
        waits = [asyncio.ensure_future(e.wait()) for e in (completion, self._replica.closing)]
        try:
            await asyncio.wait(waits, timeout=self._poll_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    def _gone(self, request: Request, request_id: str) -> Response:
        error = NotFound(
            f"no sample {request_id!r} is known here",
            hint="the replica was restarted or the result is past its retention; sample again",
        )
        return respond(request, error, status=410)


def _refuse_unknown(fields: list[str]) -> None:
    """They may change what is sampled."""
    if fields:
        raise Unsupported(
            f"{', '.join(fields)}: not known to this version",
            hint="leave it out, or upgrade homefire",
            field=fields[0],
        )


def _check_model_path(asked: SampleRequest, session: SamplingSession) -> None:
    if asked.model_path not in {None, session.model_path}:
        raise InvalidArgument(
            f"model_path is {asked.model_path!r}, the sampling session's {session.model_path!r}",
            hint="leave it out, or create a sampling session of it",
            field="model_path",
        )


def _answer(outcome: Outcome, accept: str) -> Response:
    """Takes milliseconds per MB."""
    if isinstance(outcome, StoredFailure):
        return _failure(outcome.error)
    output = outcome.output
    headers = {WEIGHTS_HEADER: weights_header(output.weights.identity, output.weights.digest)}
    if tinker_proto.CONTENT_TYPE in accept:
        body = encode_sample(output)
        return Response(body, media_type=tinker_proto.CONTENT_TYPE, headers=headers)
    return json_response(sample_json(output), headers=headers)


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
