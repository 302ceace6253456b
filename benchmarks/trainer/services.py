"""A real front behind the gateway's proxy, in this process, and a client with one connection."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import idle_engine
import uvicorn
from starlette.applications import Starlette
from starlette.routing import Route
from starlette.types import ASGIApp

from homefire.gateway.caller import Caller, Plane
from homefire.gateway.proxy import Proxy
from homefire.gateway.upstreams import Upstreams
from homefire.trainer.front.api import build_app
from homefire.trainer.front.engine_process import EngineProcess
from homefire.trainer.front.service import Front
from homefire.wire.specs import EngineKind, TrainerMode, TrainerSpec, Upstream

_SECRET = "bench"


class Served:
    """An application on a Unix socket, in a thread with an event loop of its own."""

    def __init__(self, app: ASGIApp, path: str) -> None:
        config = uvicorn.Config(
            app,
            uds=path,
            lifespan="on",
            loop="uvloop",
            http="httptools",
            log_config=None,
            access_log=False,
            timeout_keep_alive=75,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        while not self._server.started:  # uvicorn has no event for it
            if not self._thread.is_alive():
                raise RuntimeError("the measured server ended while it started")
            time.sleep(0.01)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join()


class Stack:
    """Client -> gateway -> front -> engine, every socket between them real."""

    def __init__(self, root: Path) -> None:
        self.engine = idle_engine.IdleEngine()
        self.spec = _spec(root)

        async def start_engine() -> EngineProcess:
            return await idle_engine.start(self.engine)

        front = build_app(Front(self.spec, start_engine=start_engine))
        self._front = Served(front, self.spec.listen.socket)
        self._gateway = Served(_gateway(self.spec.listen), str(root / "gateway.sock"))
        self.client = Client(str(root / "gateway.sock"))
        self.model = self.client.create_model()

    def __enter__(self) -> Stack:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self._gateway.stop()
        self._front.stop()


def _gateway(upstream: Upstream) -> ASGIApp:
    """The proxy alone: the table of routes and the keys are look-ups in dictionaries."""
    upstreams = Upstreams()
    proxy = Proxy(upstreams)

    async def answer(caller: Caller) -> None:
        await proxy.forward(caller, upstream, caller.target)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncGenerator[None]:
        yield
        await upstreams.close()

    app = Starlette(routes=[Route("/{path:path}", Plane(answer))], lifespan=lifespan)

    async def authenticated(scope, receive, send) -> None:
        scope.setdefault("state", {}).update(account="local", request_id="bench")
        await app(scope, receive, send)

    return authenticated


class Client(http.client.HTTPConnection):
    """One kept connection to a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("front")
        self._path = path
        self._seq = 0

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(self._path)

    def next_seq(self) -> int:
        self._seq += 1
        return self._seq

    def forward_backward(self, body: bytes, kind: str) -> str:
        """The request's id."""
        return json.loads(self._post("forward_backward", body, kind, ""))["request_id"]

    def result(self, request_id: str, *, accept: str) -> bytes:
        body = json.dumps({"request_id": request_id}).encode()
        return self._post("retrieve_future", body, "application/json", accept)

    def create_model(self) -> str:
        session = self._json("create_session", {})["session_id"]
        asked = {
            "session_id": session,
            "model_seq_id": 0,
            "base_model": "idle",
            "lora_config": {"rank": 0},
        }
        promise = self._json("create_model", asked)
        return json.loads(self.result(promise["request_id"], accept="application/json"))["model_id"]

    def _json(self, call: str, body: dict[str, object]) -> dict[str, str]:
        return json.loads(self._post(call, json.dumps(body).encode(), "application/json", ""))

    def _post(self, call: str, body: bytes, kind: str, accept: str) -> bytes:
        self.request("POST", f"/api/v1/{call}", body, {"content-type": kind, "accept": accept})
        response = self.getresponse()
        answer = response.read()
        if response.status != 200:
            raise RuntimeError(f"{call} answered {response.status}: {answer[:500]!r}")
        return answer


def _spec(root: Path) -> TrainerSpec:
    job = root / "idle"
    job.mkdir(exist_ok=True)
    (job / "config.json").write_text(json.dumps({"vocab_size": idle_engine.VOCABULARY}))
    return TrainerSpec(
        name="idle",
        nonce="idle",
        listen=Upstream(str(root / "idle.sock"), _SECRET),
        account="local",
        job="idle",
        base_model="idle",
        model_dir=str(job),
        tokenizer_id="idle",
        mode=TrainerMode.FULL,
        lora_rank=0,
        max_context_length=2048,
        threads=1,
        store_root=str(root / "store"),
        job_dir=str(job),
        engine=EngineKind.FAKE,
    )
