"""What an operation costs beside its computation: a real front over HTTP, and an engine that computes
nothing. From the POST of a forward_backward to its result, two calls on a kept connection."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import uvicorn
from report import Bar, Report, Row

from homefire.trainer.front.api import build_app
from homefire.trainer.front.service import Front
from homefire.wire import tinker_proto
from homefire.wire import tinker_public_pb2 as pb
from homefire.wire.engine import (
    Arrays,
    Done,
    ForwardBackward,
    ModelOpened,
    OpenModel,
    OpenSlot,
    Reply,
    Request,
    Rows,
    SlotOpened,
)
from homefire.wire.engine_frames import (
    decode_reply,
    decode_request,
    encode_reply,
    encode_request,
)
from homefire.wire.internal import SECRET_HEADER
from homefire.wire.specs import EngineKind, TrainerMode, TrainerSpec, Upstream

_SECRET = "bench"
_VOCABULARY = 16384
_LENGTHS = {"small": [32] * 4, "large": [512] * 64}


class IdleEngine:
    """Answers at once. Frames are written and read as for an engine in a process of its own."""

    pid = 0

    async def call(self, request: Request, arrays: Arrays | None = None) -> tuple[Reply, Arrays]:
        message, received = decode_request(encode_request(request, arrays))
        return decode_reply(encode_reply(*_answer(message, received)))

    async def wait(self) -> int:
        return await asyncio.get_running_loop().create_future()

    async def shut_down(self) -> None:
        """Nothing runs."""

    async def kill(self) -> int:
        return 0


def _answer(message: Request, arrays: Arrays) -> tuple[Reply, Arrays]:
    match message:
        case OpenModel():
            opened = ModelOpened(
                architecture="idle",
                vocab_size=_VOCABULARY,
                max_context_length=2048,
                num_parameters=0,
                pid=0,
            )
            return opened, {}
        case OpenSlot(slot=slot, kind=kind):
            return SlotOpened(slot=slot, kind=kind, num_trainable=0, step=0), {}
        case ForwardBackward():
            return Rows(metrics={"loss:sum": 0.0}), {
                "logprobs": np.zeros(arrays["target_tokens"].shape, np.float32)
            }
        case _:
            return Done(), {}


def measure(report: Report, root: Path, *, repeats: int) -> None:
    spec = _spec(root)
    served = _Served(spec)
    caller = _Caller(spec.listen.socket)
    try:
        model = caller.create_model()
        bars = (("small", "JSON", 3.0), ("large", "JSON", 12.0), ("large", "protobuf", 3.0))
        for size, wire, at_most in bars:
            encode = _json_body if wire == "JSON" else _protobuf_body
            median_s, num_bytes = _median_s(caller, model, encode, _LENGTHS[size], repeats)
            what = f"overhead, {wire} of {num_bytes / 1e6:.2f} MB"
            report.add(Row("-", f"{len(_LENGTHS[size])} rows", what, median_s))
            report.add(
                Bar(
                    f"{what}, ms",
                    1000 * median_s,
                    at_most=at_most,
                    limited_by="decoding, packing, hashing and one fsync of the journal",
                )
            )
    finally:
        caller.close()
        served.stop()


def _median_s(
    caller: _Caller,
    model: str,
    encode: Callable[[str, int, list[int]], tuple[str, bytes]],
    lengths: list[int],
    repeats: int,
) -> tuple[float, int]:
    times: list[float] = []
    for _ in range(repeats):
        kind, body = encode(model, caller.next_seq(), lengths)
        started = time.perf_counter()
        caller.result(caller.post("forward_backward", body, kind)["request_id"], accept=kind)
        times.append(time.perf_counter() - started)
    return statistics.median(times), len(body)


class _Served:
    """A front on a Unix socket, in a thread with an event loop of its own."""

    def __init__(self, spec: TrainerSpec) -> None:
        async def start_engine() -> IdleEngine:
            return IdleEngine()

        app = build_app(Front(spec, start_engine=start_engine))
        config = uvicorn.Config(
            app,
            uds=spec.listen.socket,
            lifespan="on",
            loop="uvloop",
            http="httptools",
            log_config=None,
            access_log=False,
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


class _Caller(http.client.HTTPConnection):
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

    def post(self, call: str, body: bytes, kind: str, accept: str = "") -> dict[str, str]:
        answer = self._post(call, body, kind, accept)
        return json.loads(answer)

    def result(self, request_id: str, *, accept: str) -> bytes:
        body = json.dumps({"request_id": request_id}).encode()
        return self._post("retrieve_future", body, "application/json", accept)

    def create_model(self) -> str:
        kind = "application/json"
        session = self.post("create_session", b"{}", kind)["session_id"]
        asked = {
            "session_id": session,
            "model_seq_id": 0,
            "base_model": "idle",
            "lora_config": {"rank": 0},
        }
        promise = self.post("create_model", json.dumps(asked).encode(), kind)
        return json.loads(self.result(promise["request_id"], accept=kind))["model_id"]

    def _post(self, call: str, body: bytes, kind: str, accept: str) -> bytes:
        headers = {"content-type": kind, "accept": accept, SECRET_HEADER: _SECRET}
        self.request("POST", f"/api/v1/{call}", body, headers)
        response = self.getresponse()
        answer = response.read()
        if response.status != 200:
            raise RuntimeError(f"{call} answered {response.status}: {answer[:500]!r}")
        return answer


def _columns(lengths: list[int]) -> list[dict[str, np.ndarray]]:
    generator = np.random.default_rng(0)
    return [
        {
            "tokens": generator.integers(0, _VOCABULARY, length),
            "target_tokens": generator.integers(0, _VOCABULARY, length),
            "logprobs": np.round(generator.standard_normal(length), 6).astype(np.float32),
            "advantages": np.round(generator.standard_normal(length), 3).astype(np.float32),
        }
        for length in lengths
    ]


def _json_body(model: str, seq: int, lengths: list[int]) -> tuple[str, bytes]:
    data = [
        {
            "model_input": {"chunks": [{"type": "encoded_text", "tokens": row["tokens"].tolist()}]},
            "loss_fn_inputs": {
                name: {
                    "data": [round(value, 6) for value in row[name].tolist()],
                    "dtype": "int64" if name == "target_tokens" else "float32",
                    "shape": [len(row[name])],
                }
                for name in ("target_tokens", "logprobs", "advantages")
            },
        }
        for row in _columns(lengths)
    ]
    given = {"data": data, "loss_fn": "importance_sampling"}
    body = {"model_id": model, "seq_id": seq, "forward_backward_input": given}
    return "application/json", json.dumps(body, separators=(",", ":")).encode()


def _protobuf_body(model: str, seq: int, lengths: list[int]) -> tuple[str, bytes]:
    message = pb.ForwardBackwardRequest(model_id=model, seq_id=seq, loss_fn="importance_sampling")
    for row in _columns(lengths):
        datum = message.data.add()
        datum.model_input.add().encoded_text.tokens = row["tokens"].astype("<i4").tobytes()
        for name in ("target_tokens", "logprobs", "advantages"):
            tensor = datum.loss_fn_inputs[name]
            tensor.dtype = pb.DTYPE_INT64 if name == "target_tokens" else pb.DTYPE_FLOAT32
            tensor.dense = row[name].tobytes()
            tensor.shape.append(len(row[name]))
    return tinker_proto.CONTENT_TYPE, message.SerializeToString()


def _spec(root: Path) -> TrainerSpec:
    job = root / "idle"
    job.mkdir(exist_ok=True)
    (job / "config.json").write_text(json.dumps({"vocab_size": _VOCABULARY}))
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
