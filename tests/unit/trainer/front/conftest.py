"""A front in this process, with the fake engine in this process too, and a client that speaks JSON."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from homefire.foundation.clock import Clock, ManualClock
from homefire.foundation.events import read_events
from homefire.trainer.engine.fake import fake_engine
from homefire.trainer.engine.saver import finished
from homefire.trainer.engine.serve import dispatch
from homefire.trainer.front.api import build_app
from homefire.trainer.front.engine_process import EngineDied
from homefire.trainer.front.service import Front
from homefire.wire.engine import (
    Arrays,
    Reply,
    Request,
    SaveReply,
    SaveRequest,
    WeightsDigest,
)
from homefire.wire.internal import SECRET_HEADER, TrainerStatus
from homefire.wire.specs import EngineKind, TrainerMode, TrainerSpec, Upstream

SECRET = "between services"


@dataclass
class UnwrittenSave:
    """Its bytes are taken."""

    request: Request
    write: Callable[[], SaveReply]
    ended: asyncio.Future[SaveReply]

    def finish(self) -> None:
        if not self.ended.done():
            self.ended.set_result(finished(self.write))


@dataclass
class Orders:
    """What the engines of one test shall do, over all their lives."""

    dies_at: list[type[Request]] = field(default_factory=list)
    """An engine dies once at each of these requests, in this order."""
    dies_of: Callable[[Request], bool] | None = None
    """An engine dies at every such request."""
    holds: type[Request] | None = None
    """Requests of this kind wait for `released`."""
    reached: asyncio.Event = field(default_factory=asyncio.Event)
    released: asyncio.Event = field(default_factory=asyncio.Event)
    writes_later: bool = False
    """Saves wait in `unwritten` until the test writes them."""
    unwritten: list[UnwrittenSave] = field(default_factory=list)
    seen: list[Request] = field(default_factory=list)
    num_started: int = 0


class EngineInProcess:
    """The fake engine behind the front's protocol, without a process."""

    pid = 4711

    def __init__(self, orders: Orders, clock: Clock) -> None:
        self._orders = orders
        self._engine = fake_engine(clock)
        self._ended = asyncio.Event()
        self._unwritten: list[UnwrittenSave] = []
        orders.num_started += 1

    async def call(self, request: Request, arrays: Arrays | None = None) -> tuple[Reply, Arrays]:
        await self._note(request)
        return dispatch(self._engine, request, arrays or {})

    async def begin(self, request: SaveRequest) -> asyncio.Future[SaveReply]:
        await self._note(request)
        write = self._engine.prepare_save(request).keep()
        save = UnwrittenSave(request, write, asyncio.get_running_loop().create_future())
        if self._orders.writes_later:
            self._orders.unwritten.append(save)
            self._unwritten.append(save)
        else:
            save.finish()
        return save.ended

    async def _note(self, request: Request) -> None:
        orders = self._orders
        orders.seen.append(request)
        if orders.dies_at and isinstance(request, orders.dies_at[0]):
            orders.dies_at.pop(0)
            self._ended.set()
        if orders.dies_of is not None and orders.dies_of(request):
            self._ended.set()
        if self._ended.is_set():
            raise EngineDied(f"died at {type(request).__name__}")
        if orders.holds is not None and isinstance(request, orders.holds):
            orders.reached.set()
            await orders.released.wait()

    async def wait(self) -> int:
        await self._ended.wait()
        return 0

    async def shut_down(self) -> None:
        self._ended.set()

    async def kill(self) -> int:
        self._ended.set()
        for save in self._unwritten:
            if not save.ended.done():
                save.ended.set_exception(EngineDied("killed while it saved"))
        return -9


@dataclass
class Client:
    """Speaks the JSON wire to a front."""

    front: Front
    http: httpx.AsyncClient
    orders: Orders

    async def post(self, call: str, /, **body: Any) -> httpx.Response:
        return await self.http.post(f"/api/v1/{call}", json=body)

    async def session(self) -> str:
        return (await self.post("create_session", tags=[])).json()["session_id"]

    async def create(self, session: str, seq: int = 0, **more: Any) -> dict[str, Any]:
        body = {"base_model": "tiny", "lora_config": {"rank": 0}, **more}
        accepted = await self.post("create_model", session_id=session, model_seq_id=seq, **body)
        assert accepted.status_code == 200, accepted.text
        return await self.result(accepted.json()["request_id"])

    async def model(self) -> str:
        """A model of a new session."""
        return (await self.create(await self.session()))["model_id"]

    async def forward_backward(
        self, model: str, seq: int, *, loss_fn: str = "cross_entropy", data: Any = None
    ) -> str:
        given = {"data": data or [make_datum([1, 2, 3, 4])], "loss_fn": loss_fn}
        body = {"model_id": model, "seq_id": seq, "forward_backward_input": given}
        return _request_id(await self.post("forward_backward", **body))

    async def forward(self, model: str, seq: int, *, data: Any = None) -> str:
        given = {"data": data or [make_datum([1, 2, 3, 4])], "loss_fn": "cross_entropy"}
        return _request_id(
            await self.post("forward", model_id=model, seq_id=seq, forward_input=given)
        )

    async def optim_step(self, model: str, seq: int, **more: Any) -> str:
        body = {"adam_params": {"learning_rate": 0.01}, **more}
        return _request_id(await self.post("optim_step", model_id=model, seq_id=seq, **body))

    async def call(self, name: str, model: str, seq: int, /, **more: Any) -> dict[str, Any]:
        request_id = _request_id(await self.post(name, model_id=model, seq_id=seq, **more))
        return await self.result(request_id)

    async def train(self, model: str, first_seq: int, steps: int) -> None:
        for step in range(steps):
            seq = first_seq + 2 * step
            await self.forward_backward(model, seq, data=[make_datum([1 + step, 2, 3])])
            await self.result(await self.optim_step(model, seq + 1))

    async def result(self, request_id: str) -> dict[str, Any]:
        while True:
            answer = await self.post("retrieve_future", request_id=request_id)
            if answer.status_code != 408:
                assert answer.status_code == 200, answer.text
                return answer.json()

    async def status(self) -> TrainerStatus:
        answer = await self.http.get("/internal/status")
        return msgspec.json.decode(answer.content, type=TrainerStatus)

    async def digest(self, slot: str = "policy") -> str:
        """Of a slot's live weights; call it while nothing runs."""
        assert self.front.worker.model is not None
        reply, _ = await self.front.worker.model.engine.call(WeightsDigest(slot))
        return reply.digest

    async def settled(self) -> None:
        """No save and no recovery point is being written."""
        await self.front.worker._saves.settled()

    def events(self, name: str) -> list[dict[str, Any]]:
        log = Path(self.front.spec.job_dir) / "events.jsonl"
        return [event for _, event in read_events(log) if event["event"] == name]


def _request_id(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return response.json()["request_id"]


def make_datum(full: list[int], weights: list[float] | None = None) -> dict[str, Any]:
    """Next-token prediction of a sequence."""
    inputs = {"target_tokens": tensor(full[1:], "int64")}
    if weights is not None:
        inputs["weights"] = tensor(weights, "float32")
    return {"model_input": {"chunks": [{"tokens": full[:-1]}]}, "loss_fn_inputs": inputs}


def tensor(values: list[Any], dtype: str) -> dict[str, Any]:
    return {"data": values, "dtype": dtype, "shape": [len(values)]}


@pytest.fixture
def datum() -> Callable[..., dict[str, Any]]:
    return make_datum


@pytest.fixture
def orders() -> Orders:
    return Orders()


@pytest.fixture
def make_spec(tmp_path: Path) -> Callable[..., TrainerSpec]:
    def make(**changes: Any) -> TrainerSpec:
        model_dir = tmp_path / "model"
        model_dir.mkdir(exist_ok=True)
        (model_dir / "config.json").write_text('{"vocab_size": 64, "max_position_embeddings": 32}')
        job = changes.get("job", "job-1")
        (tmp_path / job).mkdir(exist_ok=True)
        spec = TrainerSpec(
            name=job,
            nonce="nonce",
            listen=Upstream(str(tmp_path / f"{job}.sock"), SECRET),
            account="local",
            job="job-1",
            base_model="tiny",
            model_dir=str(model_dir),
            tokenizer_id="tiny-tokenizer",
            mode=TrainerMode.FULL,
            lora_rank=0,
            max_context_length=32,
            threads=1,
            store_root=str(tmp_path / "store"),
            job_dir=str(tmp_path / job),
            engine=EngineKind.FAKE,
        )
        return msgspec.structs.replace(spec, **changes)

    return make


@pytest.fixture
def make_engine() -> Callable[[TrainerSpec], Awaitable[EngineInProcess]]:
    """Starts an engine for a spec, as a replay does."""

    async def start(spec: TrainerSpec) -> EngineInProcess:
        return EngineInProcess(Orders(), ManualClock())

    return start


StartFront = Callable[..., contextlib.AbstractAsyncContextManager[Client]]


@pytest.fixture
def start_front(make_spec: Callable[..., TrainerSpec]) -> StartFront:
    """`async with start_front() as client`: a front that runs; it is stopped at the end.

    Entered again, it goes on with the same job directory.
    """

    @contextlib.asynccontextmanager
    async def start(
        *,
        orders: Orders | None = None,
        clock: Clock | None = None,
        crash: bool = False,
        **spec: Any,
    ) -> AsyncIterator[Client]:
        told, now = orders or Orders(), clock or ManualClock()

        async def start_engine() -> EngineInProcess:
            return EngineInProcess(told, now)

        front = Front(make_spec(**spec), now, start_engine)
        transport = httpx.ASGITransport(app=build_app(front))
        headers = {SECRET_HEADER: SECRET}
        async with httpx.AsyncClient(
            transport=transport, base_url="http://front", headers=headers
        ) as http:
            await front.start()
            try:
                yield Client(front, http, told)
            finally:
                if crash:
                    await _crash(front)
                await front.close()

    return start


async def _crash(front: Front) -> None:
    """As if the process had been killed: no recovery point, nothing finished."""
    task = front.worker._task
    assert task is not None
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    front.closing.set()
