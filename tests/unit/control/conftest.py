"""A control plane over an in-memory launcher, whose trainers and replicas are scripted services."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Route

from homefire.checkpoints import (
    CheckpointKey,
    DirectoryStore,
    SnapshotInfo,
    ensure_tiny,
    read_model_directory,
    write_base,
    write_delta,
    write_state,
)
from homefire.control.app import control_app
from homefire.control.plane import ControlConfig, ControlPlane
from homefire.control.process_keeper import KeeperConfig
from homefire.foundation.clock import ManualClock
from homefire.foundation.home import Home
from homefire.foundation.versioned import Versioned
from homefire.http.bodies import json_response, read_json
from homefire.http.client import ServiceClient
from homefire.launch.fake import FakeLauncher, FakeProcess
from homefire.wire.errors import Unavailable, error_body
from homefire.wire.internal import (
    HotLoadRequest,
    HotLoadStage,
    ReplicaStatus,
    ServiceHealth,
    TrainerState,
    TrainerStatus,
)
from homefire.wire.manifest import CheckpointFamily, Manifest
from homefire.wire.specs import ControlSpec, EngineKind, Upstream

from .root_plane import JOB, RootPlane

HEADERS = {"x-homefire-secret": "control-secret", "x-homefire-account": "local"}
GUARD_S = 20.0
"""A test that waits so long for something has failed."""


class ScriptedService:
    """A trainer front or a replica, as far as control sees it."""

    def __init__(self, process: FakeProcess, first: TrainerStatus | ReplicaStatus) -> None:
        self.process = process
        self.status: Versioned[Any] = Versioned(first)
        self.num_held = 0
        """Status polls that wait for a change."""
        self.loads: list[HotLoadRequest] = []
        self.on_load: Callable[[HotLoadRequest], None] | None = None
        self.on_forget: Callable[[], None] | None = None
        """A front that takes a recovery point when asked; without it, it says that it cannot."""
        self.app = Starlette(
            routes=[
                Route("/internal/health", self._health),
                Route("/internal/status", self._status),
                Route("/internal/hot_load", self._hot_load, methods=["POST"]),
                Route("/internal/forget_loads", self._forget_loads, methods=["POST"]),
            ]
        )

    def say(self, **changes: Any) -> None:
        version = self.status.version + 1
        self.status.set(msgspec.structs.replace(self.status.get(), version=version, **changes))

    async def _health(self, request: Request) -> Any:
        pid = self.process.record.process
        assert pid is not None
        return json_response(ServiceHealth(self.status.get().nonce, pid.pid, "scripted"))

    async def _status(self, request: Request) -> Any:
        after = request.query_params.get("after")
        self.num_held += 1
        try:
            _, status = await self.status.wait_beyond(
                after=None if after is None else int(after), timeout_s=GUARD_S
            )
        finally:
            self.num_held -= 1
        return json_response(status)

    async def _hot_load(self, request: Request) -> Any:
        asked = await read_json(request, HotLoadRequest)
        self.loads.append(asked)
        if self.on_load is None:
            self.say(identity=asked.identity, digest=asked.digest)
        else:
            self.on_load(asked)
        return json_response(self.status.get(), status=202)

    async def _forget_loads(self, request: Request) -> Any:
        if self.on_forget is None:
            return json_response(error_body(Unavailable("starting"), request_id="r"), status=503)
        self.on_forget()
        return json_response({})


class Fabric(httpx.AsyncBaseTransport):
    """Connects a client to the service on a socket while that service's process lives."""

    def __init__(self, services: Services, socket: str) -> None:
        self._services = services
        self._socket = socket

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        service = self._services.by_socket.get(self._socket)
        if service is None or not service.process.alive:
            raise httpx.ConnectError("nothing listens")
        answer = asyncio.ensure_future(
            httpx.ASGITransport(app=service.app).handle_async_request(request)
        )
        death = asyncio.ensure_future(service.process.wait())
        try:
            await asyncio.wait({answer, death}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise httpx.ReadError("the service died")
            return answer.result()
        finally:
            answer.cancel()
            death.cancel()


class Services:
    """What listens where. New processes are ready at once unless told otherwise."""

    def __init__(self) -> None:
        self.by_socket: dict[str, ScriptedService] = {}
        self.all: list[ScriptedService] = []
        self.trainers_start_as = TrainerState.READY
        self.replicas_start_ready = True
        self.die_at_once: list[str] | None = None
        """The log of every process that is started, which then exits with 1."""
        self.impostor_nonce: str | None = None

    def serve(self, process: FakeProcess) -> None:
        if self.die_at_once is not None:
            process.exit(1, log=self.die_at_once)
            return
        if process.spec.listen is None:
            return
        nonce = self.impostor_nonce or process.spec.nonce
        status: TrainerStatus | ReplicaStatus
        if process.spec.module == "homefire.trainer.front":
            status = TrainerStatus(version=1, nonce=nonce, state=self.trainers_start_as)
        else:
            ready = self.replicas_start_ready
            status = ReplicaStatus(version=1, nonce=nonce, ready=ready, identity=None, digest="")
        service = ScriptedService(process, status)
        self.by_socket[process.spec.listen.socket] = service
        self.all.append(service)

    def connect(self, upstream: Upstream) -> ServiceClient:
        return ServiceClient(upstream, transport=Fabric(self, upstream.socket))


class Control:
    """One running control plane and a client that the gateway would be."""

    def __init__(self, plane: ControlPlane) -> None:
        self.plane = plane
        self.closed = False
        transport = httpx.ASGITransport(app=control_app(plane), raise_app_exceptions=False)
        self.client = httpx.AsyncClient(
            transport=transport, base_url="http://control", headers=HEADERS, timeout=GUARD_S
        )

    async def call(
        self, method: str, path: str, body: Any = None, *, expect: int = 200, **options: Any
    ) -> Any:
        response = await self.client.request(method, path, json=body, **options)
        assert response.status_code == expect, f"{response.status_code}: {response.text}"
        return response.json()

    async def create_job(self, job: str = "j1", *, expect: int = 200, **changes: Any) -> Any:
        config = {"baseModel": "tiny", "loraRank": 0, **changes.pop("trainingConfig", {})}
        path = f"/v1/accounts/local/rlorTrainerJobs?rlorTrainerJobId={job}"
        return await self.call("POST", path, {"trainingConfig": config, **changes}, expect=expect)

    async def create_deployment(self, name: str = "d1", *, expect: int = 200, **body: Any) -> Any:
        path = f"/v1/accounts/local/deployments?deploymentId={name}"
        return await self.call("POST", path, {"baseModel": "tiny", **body}, expect=expect)

    async def job(self, job: str = "j1") -> Any:
        row = await self.plane.jobs.get("local", job)
        return row.state

    async def deployment(self, name: str = "d1") -> Any:
        return (await self.plane.deployments.get("local", name)).state

    async def eventually(self, check: Callable[[], Awaitable[bool]]) -> None:
        """Waits, pass by pass of the reconciler, until the check holds."""
        async with asyncio.timeout(GUARD_S):
            while True:
                version = self.plane.reconciler.passes.version
                if await check():
                    return
                await self.plane.reconciler.passes.wait_beyond(after=version, timeout_s=GUARD_S)

    async def job_becomes(self, state: str, job: str = "j1") -> None:
        async def check() -> bool:
            return await self.job(job) == state

        await self.eventually(check)

    async def deployment_becomes(self, state: str, name: str = "d1") -> None:
        async def check() -> bool:
            return await self.deployment(name) == state

        await self.eventually(check)

    async def close(self) -> None:
        """What a killed control plane leaves: everything runs on. A second time does nothing."""
        if not self.closed:
            self.closed = True
            await self.client.aclose()
            await self.plane.close()


class Bench:
    """A home and a machine, on which control planes come and go."""

    def __init__(self, home: Path) -> None:
        self.home = Home(home)
        self.clock = ManualClock()
        self.services = Services()
        self.launcher = FakeLauncher(self.clock, on_start=self.services.serve)
        self.store = DirectoryStore(self.home.store, self.clock)
        self._controls: list[Control] = []

    async def control(self, *, hold_s: float = GUARD_S, threads: int = 8, **spec: Any) -> Control:
        plane = ControlPlane(
            ControlSpec(
                home=str(self.home.root),
                nonce="control-nonce",
                listen=Upstream("control.sock", "control-secret"),
                public_url="http://127.0.0.1:8700",
                engine=EngineKind.FAKE,
                capacity_threads=threads,
                capacity_memory_bytes=1 << 40,
                **spec,
            ),
            launcher=self.launcher,
            clock=self.clock,
            connect=self.services.connect,
            config=ControlConfig(hold_s=hold_s, keeper=KeeperConfig(status_pace_s=0.0)),
        )
        await plane.start()
        self._controls.append(Control(plane))
        return self._controls[-1]

    def trainer(self, job: str = "j1") -> ScriptedService:
        return self._newest(f"trainer {job}")

    def replica(self, deployment: str = "d1", number: int = 0) -> ScriptedService:
        return self._newest(f"replica {deployment}/{number}")

    def save_snapshot(
        self,
        identity: str,
        *,
        job: str = "j1",
        slot: str = "policy",
        parent: Manifest | None = None,
        step: int = 1,
    ) -> Manifest:
        """A sampler snapshot of tiny's own weights: a base, or a delta that changes nothing."""
        key = CheckpointKey("local", job, slot, CheckpointFamily.SAMPLER, identity)
        tiny = ensure_tiny(self.home.models / "tiny")
        tensors = read_model_directory(tiny)
        self.clock.advance(1.0)
        info = SnapshotInfo(
            step=step,
            base_model="tiny",
            created_at=self.clock.now(),
            metadata={},
            expires_at=None,
        )
        if parent is None:
            return write_base(self.store, key, tensors, info, model_files=tiny)
        return write_delta(self.store, key, tensors, info, parent=parent, parent_tensors=tensors)

    def save_state(self, name: str, *, job: str = "j1", slot: str = "policy") -> Manifest:
        key = CheckpointKey("local", job, slot, CheckpointFamily.STATE, name)
        tensors = read_model_directory(ensure_tiny(self.home.models / "tiny"))
        self.clock.advance(1.0)
        info = SnapshotInfo(
            step=1, base_model="tiny", created_at=self.clock.now(), metadata={}, expires_at=None
        )
        return write_state(self.store, key, {"weights.safetensors": tensors}, info)

    async def close(self) -> None:
        for control in self._controls:
            await control.close()

    def _newest(self, name: str) -> ScriptedService:
        return next(s for s in reversed(self.services.all) if s.process.spec.name == name)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    """In memory where that exists: what a real disk's fsync costs is not under test here."""
    memory = Path("/dev/shm")
    place = memory if memory.is_dir() and os.access(memory, os.W_OK) else tmp_path
    with tempfile.TemporaryDirectory(dir=place) as directory:
        made = Bench(Path(directory) / "home")
        yield made
        await made.close()


@pytest.fixture
async def control(bench: Bench) -> Control:
    """The common case: one control plane with room for eight engine threads."""
    return await bench.control()


@pytest.fixture
async def root(bench: Bench, control: Control) -> RootPlane:
    """A pool with one session and one run."""
    await control.create_job(JOB)
    plane = RootPlane(bench, control)
    await plane.session()
    await plane.run()
    return plane


LOADING = HotLoadStage.LOADING
FAILED = HotLoadStage.ERROR
