"""A trainer in memory for the real tinker client: strict in order, and it remembers everything."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from homefire.wire.tinker import PassOutput, PassRequest, RowArrays
from homefire.wire.tinker_proto import decode_forward_backward, encode_output

Result = dict[str, Any] | PassOutput


@dataclass
class Held:
    """An accepted operation whose predecessors have not come yet."""

    name: str
    body: Any
    request_id: str


@dataclass
class Model:
    executed: int = 0
    held: dict[int, Held] = field(default_factory=dict)


class TrainerStub:
    """`executed` lists (operation, body) in the order of execution, `posted` in that of arrival.

    `fail[name]` fails the next operation of that name with a text.
    """

    def __init__(self) -> None:
        self.executed: list[tuple[str, Any]] = []
        self.posted: list[tuple[str, Any]] = []
        self.keys: set[str] = set()
        self.fail: dict[str, str] = {}
        self.try_again_first = False
        self._models: dict[str, Model] = {}
        self._results: dict[str, Result] = {}
        self._changed: asyncio.Event | None = None
        self._sessions = 0
        self._num_requests = 0
        simple = {
            "client/config": {},
            "client/dynamic_config": {},
            "session_heartbeat": {"type": "session_heartbeat"},
            "telemetry": {"status": "accepted"},
        }
        routes = [self._route(name, self._fixed(answer)) for name, answer in simple.items()]
        routes += [
            self._route("create_session", self._create_session),
            self._route("create_model", self._create_model),
            self._route("get_info", self._get_info),
            self._route("forward_backward", self._pass),
            self._route("retrieve_future", self._retrieve),
            *(self._route(name, self._sequenced(name)) for name in _SEQUENCED),
            Route("/api/v1/sessions/{id}/finish", _empty, methods=["POST"]),
            Route("/api/v1/list_checkpoints", self._fixed({"checkpoints": ["a", "b"]})),
            Route("/api/v1/get_server_capabilities", self._fixed({"supported_models": []})),
        ]
        self.app = Starlette(routes=routes)

    def forget(self) -> None:
        """Starts the lists anew; sessions and models stay."""
        self.executed.clear()
        self.posted.clear()
        self.keys.clear()
        self.fail.clear()

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.executed]

    def bodies(self, name: str) -> list[Any]:
        return [body for executed, body in self.executed if executed == name]

    def _route(self, name: str, endpoint: Callable) -> Route:
        return Route(f"/api/v1/{name}", endpoint, methods=["POST"])

    def _fixed(self, answer: dict) -> Callable:
        async def endpoint(request: Request) -> Response:
            return _json(answer)

        return endpoint

    async def _create_session(self, request: Request) -> Response:
        self.keys.add(request.headers["x-api-key"])
        self._sessions += 1
        return _json({"type": "create_session", "session_id": f"s{self._sessions}"})

    async def _create_model(self, request: Request) -> Response:
        body = await _body(request)
        model_id = f"{body['session_id']}:train:{body['model_seq_id']}"
        self._models[model_id] = Model()
        request_id = self._accept("create_model", body)
        self._finish(
            request_id, "create_model", body, {"type": "create_model", "model_id": model_id}
        )
        return _json({"request_id": request_id, "model_id": model_id})

    async def _get_info(self, request: Request) -> Response:
        body = await _body(request)
        data = {"arch": "qwen3", "model_name": "tiny", "tokenizer_id": "tiny"}
        answer = {"type": "get_info", "model_data": data, "model_id": body["model_id"]}
        return _json({**answer, "is_lora": False, "lora_rank": 0, "model_name": "tiny"})

    async def _pass(self, request: Request) -> Response:
        decoded = decode_forward_backward(await request.body())
        name = "forward" if decoded.body.forward_only else "forward_backward"
        return self._enqueue(name, decoded, decoded.model_id, decoded.seq_id)

    def _sequenced(self, name: str) -> Callable:
        async def endpoint(request: Request) -> Response:
            body = await _body(request)
            return self._enqueue(name, body, body["model_id"], body.get("seq_id"))

        return endpoint

    def _enqueue(self, name: str, body: Any, model_id: str, seq_id: int | None) -> Response:
        model = self._models[model_id]
        request_id = self._accept(name, body)
        if seq_id is None:
            self._execute(Held(name, body, request_id))
        else:
            model.held[seq_id] = Held(name, body, request_id)
        while (model.executed + 1) in model.held:
            model.executed += 1
            self._execute(model.held.pop(model.executed))
        return _json({"request_id": request_id, "model_id": model_id})

    def _accept(self, name: str, body: Any) -> str:
        self.posted.append((name, body))
        self._num_requests += 1
        return f"req-{self._num_requests}"

    def _execute(self, held: Held) -> None:
        if held.name in self.fail:
            result: Result = {"error": self.fail.pop(held.name), "category": "user"}
        elif isinstance(held.body, PassRequest):
            result = _logprobs(held.body)
        else:
            result = {"type": held.name, "path": held.body.get("path"), "metrics": {"lr": 1.0}}
            result["adapter_path"] = held.body.get("adapter_path")
        self._finish(held.request_id, held.name, held.body, result)

    def _finish(self, request_id: str, name: str, body: Any, result: Result) -> None:
        self.executed.append((name, body))
        self._results[request_id] = result
        if self._changed is not None:
            self._changed.set()
        self._changed = asyncio.Event()

    async def _retrieve(self, request: Request) -> Response:
        request_id = (await _body(request))["request_id"]
        if self.try_again_first:
            self.try_again_first = False
            body = {"type": "try_again", "request_id": request_id, "queue_state": "active"}
            return Response(msgspec.json.encode(body), 408, media_type="application/json")
        while request_id not in self._results:
            assert self._changed is not None
            await self._changed.wait()
        result = self._results[request_id]
        if isinstance(result, PassOutput):
            return Response(encode_output(result), media_type="application/x-protobuf")
        return _json(result)


_SEQUENCED = [
    "optim_step",
    "save_weights",
    "save_weights_for_sampler",
    "load_weights",
    "load_adapter",
]


def _logprobs(request: PassRequest) -> PassOutput:
    shapes = [row.inputs["target_tokens"].shape for row in request.body.rows]
    num = sum(int(np.prod(shape)) for shape in shapes)
    logprobs = RowArrays("float32", shapes, np.full(num, -1.0, np.float32).tobytes())
    return PassOutput(metrics={"loss:sum": float(num)}, arrays={"logprobs": logprobs})


async def _body(request: Request) -> Any:
    return msgspec.json.decode(await request.body() or b"{}")


async def _empty(request: Request) -> Response:
    return Response(status_code=204)


def _json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
