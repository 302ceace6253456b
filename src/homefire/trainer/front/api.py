"""The trainer's routes: the Tinker protocol under /api/v1, our own under /internal."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from homefire.http.app import service_app
from homefire.http.bodies import json_response, parse_json, read_body, read_json
from homefire.trainer.front import operations
from homefire.trainer.front.adapter_paths import resolve_adapter
from homefire.trainer.front.admission import Submission
from homefire.trainer.front.checkpoint_paths import find_state, state_names
from homefire.trainer.front.creation import plan_creation, plan_creation_from_state
from homefire.trainer.front.future_calls import FutureCalls, promise
from homefire.trainer.front.intake import Intake
from homefire.trainer.front.operations import (
    LoadTrainState,
    OperationKind,
    Refused,
    refuse,
    run_pass,
    step_optimizer,
)
from homefire.trainer.front.refused_calls import REFUSED_CALLS, refuse_call, refuse_custom_loss
from homefire.trainer.front.save_requests import save_external, save_snapshot, save_train_state
from homefire.trainer.front.service import Front
from homefire.wire import tinker, tinker_proto
from homefire.wire.engine import SlotKind
from homefire.wire.errors import (
    HomefireError,
    InvalidArgument,
    NotFound,
    Unavailable,
    UnknownSnapshot,
)
from homefire.wire.ids import POLICY_SLOT, model_id
from homefire.wire.internal import ACCOUNT_HEADER, ServiceHealth, TrainerState
from homefire.wire.manifest import Manifest
from homefire.wire.optim_step import OptimStepRequest

MAX_STATUS_WAIT_S = 30.0


def build_app(front: Front) -> ASGIApp:
    """Starts the front with the application and closes it after the last request."""

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncGenerator[None]:
        await front.start()
        yield
        await front.close()

    api = TrainerApi(front)
    return service_app(api.routes(), secret=front.spec.listen.secret, lifespan=lifespan)


class TrainerApi:
    def __init__(self, front: Front) -> None:
        self._front = front
        self._spec = front.spec
        self._admission = front.admission
        self._futures = FutureCalls(front)
        self._intake = Intake()

    def routes(self) -> list[Route]:
        gets = {
            "healthz": self.healthz,
            "get_server_capabilities": self.capabilities,
            "list_checkpoints": self.list_checkpoints,
        }
        posts = {
            "client/config": self.client_config,
            "client/dynamic_config": self.client_config,
            "create_session": self.create_session,
            "session_heartbeat": self.heartbeat,
            "sessions/{session_id}/finish": self.finish_session,
            "telemetry": self.telemetry,
            "create_model": self.create_model,
            "get_info": self.get_info,
            "unload_model": self.unload_model,
            "forward": self._intake.bounded(self.forward),
            "forward_backward": self._intake.bounded(self.forward_backward),
            "optim_step": self.optim_step,
            "save_weights": self.save_weights,
            "save_weights_for_sampler": self.save_weights_for_sampler,
            "save_weights_external": self.save_weights_external,
            "load_weights": self.load_weights,
            "load_adapter": self.load_adapter,
            "weights_info": self.weights_info,
            "retrieve_future": self._futures.retrieve_future,
            "cancel_future": self._futures.cancel_future,
            "create_custom_loss": self.create_custom_loss,
            **dict.fromkeys(REFUSED_CALLS, refuse_call),
        }
        return [
            *(self._route(path, call, "GET") for path, call in gets.items()),
            *(self._route(path, call, "POST") for path, call in posts.items()),
            self._route("samplers/{sampler_id}", refuse_call, "GET"),
            Route("/internal/health", self.health),
            Route("/internal/status", self.status),
            Route("/internal/forget_loads", self.forget_loads, methods=["POST"]),
        ]

    def _route(
        self, path: str, call: Callable[[Request], Awaitable[Response]], method: str
    ) -> Route:
        async def endpoint(request: Request) -> Response:
            self._check_account(request)
            return await call(request)

        return Route(f"/api/v1/{path}", endpoint, methods=[method])

    def _check_account(self, request: Request) -> None:
        """Another account's job does not exist for the caller."""
        account = request.headers.get(ACCOUNT_HEADER, self._spec.account)
        if account != self._spec.account:
            raise NotFound(f"no trainer job {self._spec.job!r} in account {account!r}")

    # About the service -----------------------------------------------------------------------

    async def healthz(self, request: Request) -> Response:
        error = self._front.status.error
        if self._front.status.state is TrainerState.FAILED and error is not None:
            raise Unavailable(error.message, hint=error.hint)
        return json_response({"status": "ok"})

    async def health(self, request: Request) -> Response:
        return json_response(ServiceHealth(self._spec.nonce, os.getpid(), "trainer"))

    async def status(self, request: Request) -> Response:
        after = request.query_params.get("after")
        wait_s = _number(request, "wait_s", 0.0)
        status = await self._front.status.read(
            after=int(_number(request, "after", 0)) if after is not None else None,
            wait_s=min(max(wait_s, 0.0), MAX_STATUS_WAIT_S),
        )
        return json_response(status)

    async def forget_loads(self, request: Request) -> Response:
        """Control is about to delete a state."""
        await self._front.worker.forget_loads()
        return json_response({})

    async def client_config(self, request: Request) -> Response:
        """All flags keep the client's defaults."""
        return json_response({})

    async def capabilities(self, request: Request) -> Response:
        spec = self._spec
        names = dict.fromkeys((spec.base_model, spec.tokenizer_id))
        models = [
            {"model_name": name, "max_context_length": spec.max_context_length, "trainable": True}
            for name in names
        ]
        return json_response({"supported_models": models})

    async def telemetry(self, request: Request) -> Response:
        await read_body(request)
        return json_response({"status": "accepted"})

    # Sessions and models ---------------------------------------------------------------------

    async def create_session(self, request: Request) -> Response:
        await read_json(request, tinker.CreateSession)
        session_id = await self._admission.create_session()
        return json_response({"type": "create_session", "session_id": session_id})

    async def heartbeat(self, request: Request) -> Response:
        body = await read_json(request, tinker.SessionRef)
        self._front.policy.check_session(body.session_id)
        return json_response({"type": "session_heartbeat"})

    async def finish_session(self, request: Request) -> Response:
        """A dedicated job's weights outlive their client; a pool closes the session's models."""
        await read_body(request)
        await self._admission.finish_session(request.path_params["session_id"])
        return json_response({})

    async def create_model(self, request: Request) -> Response:
        body = await read_json(request, tinker.CreateModel)
        self._front.policy.check_session(body.session_id)
        try:
            operation = plan_creation(body, self._spec, self._front.policy)
        except HomefireError as error:
            return promise(self._admission.fail_now(error))
        return promise(await self._admission.create(operation))

    async def get_info(self, request: Request) -> Response:
        body = await read_json(request, tinker.ModelRef)
        handle = self._admission.handle(body.model_id)
        model, name = self._front.worker.model, handle.base_model or self._spec.base_model
        data = {
            "arch": model.opened.architecture if model else None,
            "model_name": name,
            "tokenizer_id": self._spec.tokenizer_id,
        }
        info = {
            "type": "get_info",
            "model_id": handle.model_id,
            "model_data": data,
            "is_lora": handle.kind is SlotKind.LORA,
            "lora_rank": handle.lora.rank if handle.lora else 0,
            "model_name": name,
        }
        return json_response(info)

    async def unload_model(self, request: Request) -> Response:
        body = await read_json(request, tinker.UnloadModel)
        unload = self._front.policy.unload(self._admission.handle(body.model_id))
        return await self._submit(request, body.model_id, body.seq_id, unload)

    # Training --------------------------------------------------------------------------------

    async def forward(self, request: Request) -> Response:
        body = await read_body(request)
        return await self._submit_pass(lambda: _decode_forward(body), len(body))

    async def forward_backward(self, request: Request) -> Response:
        body = await read_body(request)
        is_binary = request.headers.get("content-type", "").startswith(tinker_proto.CONTENT_TYPE)
        decode = tinker_proto.decode_forward_backward if is_binary else _decode_forward_backward
        return await self._submit_pass(lambda: decode(body), len(body))

    async def _submit_pass(
        self, decode: Callable[[], tinker.PassRequest], num_bytes: int
    ) -> Response:
        def prepare() -> tuple[tinker.PassRequest, Submission]:
            decoded = decode()
            return decoded, self._admission.submission(run_pass(decoded.body))

        decoded, submission = await self._intake.parse(prepare, num_bytes)
        model, seq = decoded.model_id, decoded.seq_id
        return promise(await self._admission.accept_in_order(model, seq, submission), model)

    async def optim_step(self, request: Request) -> Response:
        body = await read_json(request, OptimStepRequest)
        return await self._submit(request, body.model_id, body.seq_id, step_optimizer(body))

    async def save_weights(self, request: Request) -> Response:
        body = await read_json(request, tinker.SaveWeights)
        return await self._submit(request, body.model_id, body.seq_id, save_train_state(body))

    async def save_weights_for_sampler(self, request: Request) -> Response:
        body = await read_json(request, tinker.SaveWeightsForSampler)
        handle = self._admission.handle(body.model_id)
        operation = save_snapshot(
            body, sampler=self._spec.sampler, session_id=handle.session_id, run=handle.slot
        )
        return await self._submit(request, body.model_id, body.seq_id, operation)

    async def save_weights_external(self, request: Request) -> Response:
        body = await read_json(request, tinker.SaveWeightsExternal)
        return await self._submit(request, body.model_id, body.seq_id, save_external(body))

    async def load_weights(self, request: Request) -> Response:
        body = await read_json(request, tinker.LoadWeights)
        if body.model_id is not None:
            operation = await self._load(body.model_id, body)
            return await self._submit(request, body.model_id, body.seq_id, operation)
        if body.session_id is None or body.model_seq_id is None:
            raise InvalidArgument(
                "load_weights names no model", hint="send model_id, or session_id and model_seq_id"
            )
        return await self._create_from_state(body)

    async def _load(self, model: str, body: tinker.LoadWeights) -> LoadTrainState | Refused:
        """What has expired is refused here: a replay loads it again, then expired or not. What is
        not there may be on its way, in a save that is still queued."""
        slot, store = self._admission.handle(model).slot, self._front.store

        def expired() -> HomefireError | None:
            try:
                key = find_state(store, body.path, spec=self._spec, slot=slot)
            except HomefireError:
                return None
            try:
                store.loadable(key)
            except UnknownSnapshot as error:
                return error
            return None

        error = await asyncio.to_thread(expired)
        if error is not None:
            return refuse(OperationKind.LOAD_WEIGHTS, error)
        return LoadTrainState(body.path, bool(body.optimizer))

    async def _create_from_state(self, body: tinker.LoadWeights) -> Response:
        session, policy = body.session_id or "", self._front.policy
        policy.check_session(session)
        own = policy.slot(model_id(session, body.model_seq_id or 0), SlotKind.FULL)
        try:
            manifest = await self._state_manifest(body.path, slot=own)
            operation = plan_creation_from_state(body, manifest, self._spec, policy)
        except HomefireError as error:
            return promise(self._admission.fail_now(error))
        return promise(await self._admission.create(operation))

    async def load_adapter(self, request: Request) -> Response:
        body = await read_json(request, tinker.LoadAdapter)
        handle = self._admission.handle(body.model_id)
        try:
            operation = await asyncio.to_thread(
                resolve_adapter,
                body.adapter_path,
                store=self._front.store,
                spec=self._spec,
                slot=handle.slot,
            )
        except HomefireError as error:
            operation = refuse(OperationKind.LOAD_ADAPTER, error)
        return await self._submit(request, body.model_id, body.seq_id, operation)

    async def create_custom_loss(self, request: Request) -> Response:
        return await refuse_custom_loss(request, self._admission)

    async def list_checkpoints(self, request: Request) -> Response:
        spec = self._spec
        names = await asyncio.to_thread(
            state_names,
            self._front.store,
            account=spec.account,
            job=spec.job,
            slot=POLICY_SLOT,
        )
        return json_response({"checkpoints": names})

    async def weights_info(self, request: Request) -> Response:
        body = await read_json(request, tinker.WeightsInfo)
        manifest = await self._state_manifest(body.tinker_path, slot=POLICY_SLOT)
        lora = manifest.lora
        info: dict[str, Any] = {"base_model": manifest.base_model, "is_lora": lora is not None}
        if lora is not None:
            info |= {
                "lora_rank": lora.rank,
                "train_unembed": lora.train_unembed,
                "train_mlp": lora.train_mlp,
                "train_attn": lora.train_attn,
            }
        return json_response(info)

    async def _state_manifest(self, path: str, *, slot: str) -> Manifest:
        store = self._front.store

        def find() -> Manifest:
            return store.loadable(find_state(store, path, spec=self._spec, slot=slot))

        return await asyncio.to_thread(find)

    async def _submit(
        self, request: Request, model: str, seq: int | None, operation: operations.Operation
    ) -> Response:
        submission = self._admission.submission(operation)
        if seq is None:
            key = request.headers.get("x-idempotency-key", "")
            return promise(await self._admission.accept_at_end(model, key, submission), model)
        return promise(await self._admission.accept_in_order(model, seq, submission), model)


def _number(request: Request, name: str, default: float) -> float:
    text = request.query_params.get(name, "")
    try:
        return float(text) if text else default
    except ValueError as exc:
        raise InvalidArgument(f"{name} is {text!r}", hint="use a number", field=name) from exc


def _decode_forward(body: bytes) -> tinker.PassRequest:
    return tinker.forward_pass(parse_json(body, tinker.ForwardRequest))


def _decode_forward_backward(body: bytes) -> tinker.PassRequest:
    return tinker.forward_backward_pass(parse_json(body, tinker.ForwardBackwardRequest))
