"""One rank of two dies: all are started anew, and the job ends as if nothing had happened."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from faults.front_process import FrontProcess, digest, train
from homefire.checkpoints import ensure_tiny
from homefire.wire.specs import EngineKind

STEPS = 3


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., FrontProcess]]:
    model_dir = ensure_tiny(tmp_path / "tiny")
    started: list[FrontProcess] = []

    def begin() -> FrontProcess:
        options: dict[str, Any] = {"engine": EngineKind.TORCH, "ranks": 2}
        root = tmp_path / str(len(started))
        started.append(FrontProcess(root, model_dir=str(model_dir), **options))
        return started[-1]

    yield begin
    for front in started:
        front.close()


def children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]


def test_a_rank_killed_between_steps_leaves_the_same_weights_and_no_orphan(start) -> None:
    quiet, front = start(), start()
    models = [f.model() for f in (quiet, front)]
    train(quiet, models[0], steps=range(STEPS))
    train(front, models[1], steps=range(2))
    before = children(front.process.pid)
    assert len(before) == 2
    (follower,) = set(before) - {front.events("engine_started")[-1]["pid"]}
    os.kill(follower, signal.SIGKILL)
    front.await_restarted_engine(restarts=1)
    train(front, models[1], steps=range(2, STEPS))
    assert not set(before) & set(children(front.process.pid))
    end = 3 * STEPS + 1
    assert digest(front, models[1], seq=end) == digest(quiet, models[0], seq=end)
    assert front.stop() == 0
