"""A parked pool comes back as it was: weights, optimizer, gradients, and the order of requests.

Control runs here with a clock of our own, over real trainers with the fake engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from homefire.control.app import control_app
from homefire.control.plane import ControlPlane
from homefire.foundation.clock import ManualClock
from homefire.http.client import ServiceClient
from homefire.launch.local import LocalLauncher
from homefire.wire.specs import ControlSpec, EngineKind, Upstream

IDLE_S = 600.0
GUARD_S = 60.0
HEADERS = {"x-homefire-secret": "secret", "x-homefire-account": "local"}
TOKENS = list(b"what was parked goes on")


class Server:
    """A control plane and the trainers that it starts, called as the gateway calls them."""

    def __init__(self, home: Path) -> None:
        self.clock = ManualClock()
        spec = ControlSpec(
            home=str(home),
            nonce="nonce",
            listen=Upstream(str(home / "unused.sock"), "secret"),
            public_url="http://127.0.0.1:1",
            engine=EngineKind.FAKE,
            pool_idle_s=IDLE_S,
        )
        self.plane = ControlPlane(spec, launcher=LocalLauncher(), clock=self.clock)
        self._client = httpx.AsyncClient(
            transport=httpx.ASGITransport(app=control_app(self.plane)),
            base_url="http://control",
            headers=HEADERS,
            timeout=GUARD_S,
        )

    async def control(self, path: str, **body: Any) -> Any:
        response = await self._client.post(path, json=body)
        assert response.status_code == 200, response.text
        return response.json()

    async def model(self, session: str, number: int) -> str:
        """An adapter whose beginning does not depend on its name."""
        asked = {"session_id": session, "model_seq_id": number, "base_model": "tiny"}
        place = await self.control("/internal/tinker/runs", account="local", rank=4, **asked)
        await self.until(place["job"], "JOB_STATE_RUNNING")
        lora = {"rank": 4, "seed": 7}
        await self.trainer(place["job"], "create_model", lora_config=lora, **asked)
        return place["run"]

    async def trainer(self, job: str, operation: str, **body: Any) -> Any:
        """An operation and its result."""
        upstream = self.plane.routes.get().trainers[f"local/{job}"].upstream
        assert upstream is not None
        client = ServiceClient(upstream, timeout_s=GUARD_S)
        try:
            promise = await client.post(f"/api/v1/{operation}", body, dict[str, Any])
            poll = {"request_id": promise["request_id"]}
            result = await client.post("/api/v1/retrieve_future", poll, dict[str, Any])
        finally:
            await client.close()
        assert "error" not in result, result
        return result

    async def until(self, job: str, state: str) -> None:
        """Until it is in this state, and the gateway would know."""
        async with asyncio.timeout(GUARD_S):
            while True:
                version = self.plane.reconciler.passes.version
                route = self.plane.routes.get().trainers.get(f"local/{job}")
                if route is not None and route.state == state:
                    return
                await self.plane.reconciler.passes.wait_beyond(after=version, timeout_s=GUARD_S)

    async def park(self, job: str) -> None:
        """Nobody does anything for as long as it takes; control looks twice to be sure."""
        for _ in range(2):
            self.clock.advance(IDLE_S)
            version = self.plane.reconciler.passes.version
            self.plane.reconciler.wake()
            await self.plane.reconciler.passes.wait_beyond(after=version, timeout_s=GUARD_S)
        await self.until(job, "JOB_STATE_PAUSED")
        await self._until_stopped(job)

    async def _until_stopped(self, job: str) -> None:
        async with asyncio.timeout(GUARD_S):
            while True:
                version = self.plane.reconciler.passes.version
                if (await self.plane.jobs.get("local", job)).supervision.process is None:
                    return
                await self.plane.reconciler.passes.wait_beyond(after=version, timeout_s=GUARD_S)

    async def close(self) -> None:
        await self._client.aclose()
        await self.plane.stop_processes()
        await self.plane.close()


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    made = Server(tmp_path / "home")
    await made.plane.start()
    yield made
    await made.close()


def gradient(model: str, seq: int, *, scale: float = 1.0) -> dict[str, Any]:
    weights = [scale] * (len(TOKENS) - 1)
    datum = {
        "model_input": {"chunks": [{"type": "encoded_text", "tokens": TOKENS[:-1]}]},
        "loss_fn_inputs": {
            "target_tokens": {"data": TOKENS[1:], "dtype": "int64"},
            "weights": {"data": weights, "dtype": "float32"},
        },
    }
    body = {"data": [datum], "loss_fn": "cross_entropy"}
    return {"model_id": model, "seq_id": seq, "forward_backward_input": body}


def step(model: str, seq: int) -> dict[str, Any]:
    return {"model_id": model, "seq_id": seq, "adam_params": {"learning_rate": 0.1}}


async def test_weights_optimizer_and_gradients_survive_parking_bit_for_bit(server):
    session = (await server.control("/api/v1/create_session"))["session_id"]
    parked, twin = [await server.model(session, number) for number in (0, 1)]
    job = (await server.plane.tinker.runs.find("local", parked)).job

    async def first_half(model: str) -> None:
        await server.trainer(job, "forward_backward", **gradient(model, 1))
        await server.trainer(job, "optim_step", **step(model, 2))
        await server.trainer(job, "forward_backward", **gradient(model, 3, scale=0.5))

    async def second_half(model: str) -> Any:
        stepped = await server.trainer(job, "optim_step", **step(model, 4))
        again = await server.trainer(job, "forward_backward", **gradient(model, 5))
        del stepped["metrics"]["step_time_s"]  # two runs take their own time
        return stepped["metrics"], again["metrics"], again["loss_fn_outputs"]

    await first_half(parked)
    await server.park(job)
    await server.control("/internal/tinker/wake", account="local", service=job)
    await server.until(job, "JOB_STATE_RUNNING")
    await first_half(twin)
    assert await second_half(parked) == await second_half(twin)


async def test_a_parked_pool_still_answers_what_was_asked_before(server):
    session = (await server.control("/api/v1/create_session"))["session_id"]
    model = await server.model(session, 0)
    job = (await server.plane.tinker.runs.find("local", model)).job
    before = await server.trainer(job, "forward_backward", **gradient(model, 1))
    await server.park(job)
    await server.control("/internal/tinker/wake", account="local", service=job)
    await server.until(job, "JOB_STATE_RUNNING")
    assert await server.trainer(job, "forward_backward", **gradient(model, 1)) == before
