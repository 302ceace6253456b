"""The completion routes: check, submit, wait for the admission, answer whole or as a stream."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, suppress
from functools import partial
from typing import TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from homefire.http.app import request_id_of
from homefire.http.bodies import decode_json, read_body
from homefire.inference.engine.protocol import InferenceEngine, Started, Ticket
from homefire.inference.replica.answering import Answer
from homefire.inference.replica.answers import (
    AnswerFormat,
    ChatFormat,
    CompletionFormat,
    Envelope,
    GenerateFormat,
)
from homefire.inference.replica.chat import render_chat
from homefire.inference.replica.chat_template import refuse_without_template
from homefire.inference.replica.event_stream import EventStream
from homefire.inference.replica.model_weights import name_of, weights_of
from homefire.inference.replica.order import Order, order_chat, order_completion
from homefire.inference.replica.replica import Replica
from homefire.inference.replica.reply import Reply
from homefire.wire.completions import (
    IGNORED_HEADER,
    ChatCompletionRequest,
    CompletionRequest,
    GenerateRequest,
    as_completion,
    unknown_fields,
)
from homefire.wire.errors import CanaryMismatch, Unavailable, WeightsMismatch
from homefire.wire.internal import WEIGHTS_HEADER
from homefire.wire.manifest import weights_header

MAX_COMPLETION_BODY_BYTES = 64 << 20
_ATTEMPTS = 3
Asked = TypeVar("Asked", CompletionRequest, ChatCompletionRequest, GenerateRequest)
_Request = CompletionRequest | ChatCompletionRequest


class CompletionRoutes:
    """`POST …/completions`, `…/chat/completions` and `…/generate` of one replica."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica

    async def completions(self, request: Request) -> Response:
        asked, ignored = await _read(request, CompletionRequest)
        order = order_completion(asked, self._replica.tokenizer, self._replica.limits)
        return await self._answer(request, order, asked, ignored, CompletionFormat())

    async def chat_completions(self, request: Request) -> Response:
        asked, ignored = await _read(request, ChatCompletionRequest)
        template = self._replica.template
        if template is None:
            raise refuse_without_template(self._replica.spec.model_dir)
        text, unread = render_chat(asked, template)
        order = order_chat(asked, text, self._replica.tokenizer, self._replica.limits)
        return await self._answer(request, order, asked, ignored + unread, ChatFormat())

    async def generate(self, request: Request) -> Response:
        generate, ignored = await _read(request, GenerateRequest)
        body = msgspec.json.encode(as_completion(generate))
        asked, also_ignored = await _decode(body, CompletionRequest)
        order = order_completion(asked, self._replica.tokenizer, self._replica.limits)
        return await self._answer(request, order, asked, ignored + also_ignored, GenerateFormat())

    async def _answer(
        self,
        request: Request,
        order: Order,
        asked: _Request,
        ignored: list[str],
        answers: AnswerFormat,
    ) -> Response:
        replica, arrived_at = self._replica, self._replica.clock.monotonic()
        replica.num_asked += 1
        live, started = await self._start(request, order, asked)
        model_of = partial(name_of, asked.model, replica=replica)
        try:
            answer = Answer(
                order,
                started,
                self._envelope(request, model_of(started.weights), answers),
                answers,
                tokenizer=replica.tokenizer,
                model_of=model_of,
                arrived_at=arrived_at,
                clock=replica.clock,
            )
            headers = _headers(started, ignored)
            if order.is_streamed:
                events = answer.events(live.reply, request_id=request_id_of(request))
                return EventStream(events, headers=headers, on_close=live.close)
            body = await answer.whole(live.reply)
        except BaseException:
            await live.close()
            raise
        await live.close()
        return Response(body, media_type="application/json", headers=headers | answer.headers())

    async def _start(
        self, request: Request, order: Order, asked: _Request
    ) -> tuple[LiveGeneration, Started]:
        """A sampler's weights can be changed from outside between a turn and an admission; the request
        then takes another. So it does after an adapter that did not stand its canary, to load it again."""
        if self._replica.spec.samples_job:
            for _ in range(_ATTEMPTS - 1):
                with suppress(WeightsMismatch, CanaryMismatch):
                    return await self._try_to_start(request, order, asked)
        return await self._try_to_start(request, order, asked)

    async def _try_to_start(
        self, request: Request, order: Order, asked: _Request
    ) -> tuple[LiveGeneration, Started]:
        replica = self._replica
        async with AsyncExitStack() as stack:
            weights = await stack.enter_async_context(
                weights_of(asked.model, asked.expect_identity, replica)
            )
            reply = Reply(order.num_choices)
            sequences = order.sequences(replica.tokenizer, replica.limits)
            ticket = replica.engine.submit(sequences, reply, weights=weights)
            live = LiveGeneration(request, reply, replica.engine, ticket)
            try:
                started = await reply.started()
            except BaseException:
                await live.close()
                raise
            live.hold(stack.pop_all())
        return live, started

    def _envelope(self, request: Request, model: str, answers: AnswerFormat) -> Envelope:
        return Envelope(
            id=answers.id_prefix + request_id_of(request),
            created=int(self._replica.clock.now()),
            model=model,
        )


class LiveGeneration:
    """A submitted generation that ends with its client: a disconnect cancels it."""

    def __init__(
        self, request: Request, reply: Reply, engine: InferenceEngine, ticket: Ticket
    ) -> None:
        self.reply = reply
        self._engine = engine
        self._ticket = ticket
        self._held = AsyncExitStack()
        self._watch = asyncio.create_task(self._watch_client(request))

    def hold(self, resources: AsyncExitStack) -> None:
        """Until it is closed."""
        self._held = resources

    async def close(self) -> None:
        self._watch.cancel()
        if not self.reply.is_done:
            self._engine.cancel(self._ticket)
        await self._held.aclose()

    async def _watch_client(self, request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        if not self.reply.is_done:
            self._engine.cancel(self._ticket)
            self.reply.abandon(Unavailable("the client went away"))


async def _read(request: Request, kind: type[Asked]) -> tuple[Asked, list[str]]:
    """The request, and the fields of it that are ignored."""
    return await _decode(await read_body(request, max_bytes=MAX_COMPLETION_BODY_BYTES), kind)


async def _decode(body: bytes, kind: type[Asked]) -> tuple[Asked, list[str]]:
    asked = await decode_json(body, kind)
    return asked, unknown_fields(body, kind)


def _headers(started: Started, ignored: list[str]) -> dict[str, str]:
    weights = started.weights
    headers = {WEIGHTS_HEADER: weights_header(weights.name, weights.digest)}
    if ignored:
        headers[IGNORED_HEADER] = ",".join(ignored)
    return headers
