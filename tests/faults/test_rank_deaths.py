"""Ranks that die, hang or are missing: all are started anew, and the job ends as if nothing had happened."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from faults.front_process import FrontProcess, digest, submit_step, train
from homefire.checkpoints import ensure_tiny
from homefire.foundation.process import ProcessId, identify, is_alive
from homefire.wire.specs import EngineKind

STEPS = 3
END = 3 * STEPS + 1


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_tiny(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def start(tmp_path: Path, model_dir: Path) -> Iterator[Callable[..., FrontProcess]]:
    started: list[FrontProcess] = []

    def begin(**options: Any) -> FrontProcess:
        spec = {"engine": EngineKind.TORCH, "ranks": 2, "model_dir": str(model_dir), **options}
        started.append(FrontProcess(tmp_path / str(len(started)), **spec))
        return started[-1]

    yield begin
    for front in started:
        front.close()


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> str:
    """The digest of the job when nothing happens to it."""
    root = tmp_path_factory.mktemp("quiet") / "front"
    quiet = FrontProcess(root, engine=EngineKind.TORCH, ranks=2, model_dir=str(model_dir))
    try:
        return outcome(quiet)
    finally:
        quiet.close()


def outcome(front: FrontProcess) -> str:
    model = front.model()
    train(front, model, steps=range(STEPS))
    return digest(front, model, seq=END)


def once(points: dict[str, str], folder: Path) -> str:
    """Failpoints that act in the first engine that reaches them."""
    return ";".join(f"{name}={action}:{folder / name}" for name, action in points.items())


def children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]


def ranks_of(front: FrontProcess) -> list[ProcessId]:
    """Rank 0 first."""
    first = front.events("engine_started")[-1]["pid"]
    others = sorted(set(children(front.process.pid)) - {first})
    found = [identify(pid) for pid in (first, *others)]
    return [process for process in found if process is not None]


def test_a_rank_killed_between_steps_leaves_the_same_weights_and_no_orphan(start, expected) -> None:
    front = start()
    model = front.model()
    train(front, model, steps=range(2))
    before = ranks_of(front)
    assert len(before) == 2
    os.kill(before[1].pid, signal.SIGKILL)
    front.await_restarted_engine(restarts=1)
    train(front, model, steps=range(2, STEPS))
    assert not any(is_alive(process) for process in before)
    assert digest(front, model, seq=END) == expected
    assert front.stop() == 0


@pytest.mark.long
def test_ranks_missing_at_the_start_or_killed_in_a_collective_are_noticed_at_once(
    start, expected, tmp_path
) -> None:
    """The others are not left to the ten minutes that a collective may take."""
    points = {"rank.1.loaded": "kill@1", "rank.1.reduce": "kill@8"}
    front = start(failpoints=once(points, tmp_path))
    assert outcome(front) == expected
    told = [event["detail"].split(" during")[0] for event in front.events("engine_died")]
    assert told == ["rank 1 ended with status -9"] * 2
    assert front.stop() == 0


@pytest.mark.long
def test_a_rank_that_hangs_in_a_collective_is_given_up_after_the_timeout(
    start, expected, tmp_path
) -> None:
    front = start(failpoints=once({"rank.1.reduce": "hang@8"}, tmp_path), rank_timeout_s=15.0)
    assert outcome(front) == expected
    (died,) = front.events("engine_died")
    assert died["detail"].startswith("rank 0 ended with status 1")
    assert front.stop() == 0


@pytest.mark.long
def test_a_request_that_kills_a_rank_twice_fails_and_the_job_goes_on(start) -> None:
    """Each of the engines has done one chunk when it comes to the second."""
    front = start(failpoints="rank.1.KeepGradient=kill@2")
    model = front.model()
    first, second, step = (front.result(request) for request in submit_step(front, model, 0))
    assert "error" not in first
    assert "died 2 times during this request" in second["error"]
    assert "cleared, not stepped" in step["error"]
    assert front.status().engine_restarts == 2
    adam = {"learning_rate": 0.05}
    asked = front.call("optim_step", model_id=model, seq_id=4, adam_params=adam)
    assert "error" not in front.result(asked["request_id"])
    assert front.stop() == 0


def test_ranks_end_with_a_front_that_is_killed_while_one_of_them_hangs(start, tmp_path) -> None:
    front = start(failpoints=once({"rank.1.reduce": "hang@1"}, tmp_path))
    model = front.model()
    ranks = ranks_of(front)
    submit_step(front, model, 0)
    await_file(tmp_path / "rank.1.reduce")
    front.process.kill()
    front.process.wait(30)
    for process in ranks:
        await_end(process)


def await_file(path: Path) -> None:
    while not path.exists():
        os.sched_yield()


def await_end(process: ProcessId) -> None:
    """Of a process that is not our child."""
    descriptor = os.pidfd_open(process.pid)
    with os.fdopen(descriptor):
        ended, _, _ = select.select([descriptor], [], [], 60)
    assert ended, f"process {process.pid} is still there"
