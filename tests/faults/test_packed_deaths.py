"""A pool of the real engine, killed while passes of several tenants are packed; then done again from its
journal, bit for bit."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from faults.front_process import FrontProcess, digest, submit_step
from homefire.checkpoints import ensure_tiny
from homefire.foundation.clock import SystemClock
from homefire.trainer.front.engine_process import EngineProcess
from homefire.trainer.front.journal import read_journal
from homefire.trainer.front.records import PackCompleted
from homefire.trainer.front.recovery import journal_directory
from homefire.trainer.front.replay import Replay, Verified
from homefire.wire.specs import EngineKind, TrainerMode, TrainerSpec

SESSIONS = [f"ts-{n:016x}" for n in range(3)]
STEPS = 3


@pytest.fixture
def pool(tmp_path: Path):
    model_dir = ensure_tiny(tmp_path / "tiny")
    more: dict[str, Any] = {"mode": TrainerMode.LORA, "job": "pool-1", "pooled": True}
    front = FrontProcess(
        tmp_path / "pool", model_dir=str(model_dir), engine=EngineKind.TORCH, **more
    )
    yield front
    front.close()


def test_a_pool_killed_in_a_long_queue_of_packs_ends_as_its_journal_says(pool, tmp_path) -> None:
    """All is queued while the engine is still loading, so passes do meet."""
    models = [create(pool, session) for session in SESSIONS]
    requests = [
        request
        for step in range(STEPS)
        for model in models
        for request in submit_step(pool, model, step)
    ]
    first = pool.result(requests[0])
    assert "error" not in first
    pool.kill_engine()
    results = [pool.result(request) for request in requests]
    assert not any("error" in result for result in results)
    pool.await_restarted_engine(restarts=1)
    assert pool.status().error is None
    ends = {model: digest(pool, model, seq=3 * STEPS + 1) for model in models}
    assert len(set(ends.values())) == len(models)
    assert pool.stop() == 0
    sizes = pack_sizes(pool.spec)
    assert max(sizes, default=0) == len(models)
    verified = asyncio.run(replayed(pool.spec, tmp_path / "replay"))
    assert verified.replayed.divergences == []
    assert verified.differences == []
    assert {name: end.digest for name, end in verified.replayed.slots.items()} == ends


def create(pool: FrontProcess, session: str) -> str:
    """Not waited for."""
    asked = {"session_id": session, "model_seq_id": 0, "base_model": "tiny"}
    pool.call("create_model", **asked, lora_config={"rank": 4})
    return f"{session}:train:0"


def pack_sizes(spec: TrainerSpec) -> list[int]:
    records = (record for _, record in read_journal(journal_directory(spec)))
    return [len(r.completed) for r in records if isinstance(r, PackCompleted)]


async def replayed(spec: TrainerSpec, workspace: Path) -> Verified:
    workspace.mkdir()

    async def start_engine(spec: TrainerSpec) -> EngineProcess:
        log = workspace / "engine.log"
        return await EngineProcess.start(spec.engine, threads=spec.threads, log=log)

    replay = Replay(spec, workspace, start_engine, SystemClock())
    return await replay.verify(lambda done, total: None)
