"""Fixtures: a bench for the scheduler, a store of canaries, a replica with the fake engine."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from homefire.checkpoints import DirectoryStore, ensure_tiny
from homefire.foundation.clock import Clock, ManualClock, SystemClock
from homefire.inference.engine.fake import BigramNetwork
from homefire.inference.engine.opening import open_engine
from homefire.inference.engine.scheduler import Scheduler, SchedulerLimits
from homefire.inference.replica.app import replica_app
from homefire.inference.replica.replica import OpenEngine, Replica
from homefire.inference.replica.tokenizer import ModelTokenizer
from homefire.wire.specs import EngineKind, ReplicaSpec, Upstream
from unit.inference.caller import SECRET, Caller
from unit.inference.canaries import Snapshots
from unit.inference.scheduler_bench import Bench


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tokenizer(tiny_directory: Path) -> ModelTokenizer:
    return ModelTokenizer.open(tiny_directory)


@pytest.fixture
def make_bench(tiny_directory: Path) -> Callable[..., Bench]:
    def make(network: Any = None, **limits: Any) -> Bench:
        network = network or BigramNetwork(tiny_directory, max_context_length=1 << 20)
        clock = ManualClock()
        chosen = SchedulerLimits(**{"delivery_interval_s": 0.0, **limits})
        scheduler = Scheduler(network, network.base_weights(), limits=chosen, clock=clock)
        return Bench(scheduler, clock)

    return make


@pytest.fixture
def snapshots(tmp_path: Path, tiny_directory: Path) -> Snapshots:
    return Snapshots(DirectoryStore(tmp_path / "store"), tiny_directory)


StartReplica = Callable[..., Any]


@pytest.fixture
def start_replica(tmp_path: Path, tiny_directory: Path, snapshots: Snapshots) -> StartReplica:
    """`async with start_replica() as caller:` a ready replica with the fake engine."""

    @asynccontextmanager
    async def start(
        *,
        engine: OpenEngine = open_engine,
        wait: bool = True,
        clock: Clock | None = None,
        **overrides: Any,
    ) -> AsyncIterator[Caller]:
        spec = ReplicaSpec(
            **{
                "name": "d/0",
                "nonce": "nonce-1",
                "listen": Upstream("unused", SECRET),
                "account": "local",
                "deployment": "d",
                "replica": 0,
                "base_model": "accounts/local/models/tiny",
                "model_dir": str(tiny_directory),
                "max_context_length": 2048,
                "threads": 1,
                "store_root": str(snapshots.store.root),
                "replica_dir": str(tmp_path / "replica"),
                "engine": EngineKind.FAKE,
                **overrides,
            }
        )
        replica = Replica(spec, engine, clock or SystemClock())
        caller = Caller(replica_app(replica), spec.model_dir)
        replica.start()
        try:
            if wait:
                await caller.wait(lambda status: status.ready)
            yield caller
        finally:
            await replica.stop()

    return start
