"""Deaths of the trainer front and of its engine, as real processes: nothing acknowledged is lost."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from faults.front_process import FrontProcess, digest, submit_step, train
from homefire.wire.specs import TrainerMode

STEPS = 6
END = 3 * STEPS + 1
"""The seq behind the last step."""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., FrontProcess]]:
    """Fronts on directories of their own, ended at the end."""
    started: list[FrontProcess] = []

    def begin(**options: Any) -> FrontProcess:
        started.append(FrontProcess(tmp_path / str(len(started)), **options))
        return started[-1]

    yield begin
    for front in started:
        front.close()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest after all steps when nothing dies."""
    front = FrontProcess(tmp_path_factory.mktemp("undisturbed"))
    try:
        model = front.model()
        train(front, model, steps=range(STEPS))
        return digest(front, model, seq=END)
    finally:
        front.close()


def assert_as_if_nothing_had_happened(front: FrontProcess, model: str, undisturbed: str) -> None:
    assert digest(front, model, seq=END) == undisturbed
    status = front.status()
    assert status.error is None
    assert (status.step, status.num_applied) == (STEPS, 3 * STEPS + 2)


def test_an_engine_killed_between_operations_leaves_the_same_weights(start, undisturbed) -> None:
    front = start()
    model = front.model()
    train(front, model, steps=range(2))
    front.kill_engine()
    train(front, model, steps=range(2, 4))
    front.await_restarted_engine(restarts=1)
    front.kill_engine()
    results = train(front, model, steps=range(4, STEPS))
    assert [result["step"] for result in results] == [5, 6]
    assert_as_if_nothing_had_happened(front, model, undisturbed)
    assert front.status().engine_restarts == 2
    assert front.num_starts == 1


def test_an_engine_killed_with_a_long_queue_leaves_the_same_weights(start, undisturbed) -> None:
    front = start()
    model = front.model()
    results = []
    for restarts, half in enumerate((range(3), range(3, STEPS)), start=1):
        accepted = [submit_step(front, model, step) for step in half]
        front.kill_engine()
        front.await_restarted_engine(restarts=restarts)
        results += [front.result(requests[-1]) for requests in accepted]
    assert [result["step"] for result in results] == [1, 2, 3, 4, 5, 6]
    assert_as_if_nothing_had_happened(front, model, undisturbed)
    assert front.num_starts == 1


def test_a_stop_finishes_with_zero_and_the_next_start_goes_on_at_the_same_step(
    start, undisturbed
) -> None:
    front = start()
    model = front.model()
    train(front, model, steps=range(3))
    assert front.stop() == 0
    front.start_again()
    train(front, model, steps=range(3, STEPS))
    assert_as_if_nothing_had_happened(front, model, undisturbed)
    assert front.status().replayed == 0


def test_a_front_killed_with_requests_in_flight_goes_on_with_the_same_client(
    start, undisturbed
) -> None:
    front = start()
    model = front.model()
    train(front, model, steps=range(2))
    assert front.stop(signal.SIGKILL) == -signal.SIGKILL
    train(front, model, steps=range(2, STEPS))
    assert_as_if_nothing_had_happened(front, model, undisturbed)
    assert front.num_starts == 2


CELLS = [
    f"{name}=kill@{count}"
    for name, counts in {
        "journal.before_fsync": (4, 11, 20),
        "journal.after_fsync_before_ack": (1, 5, 12),
        "journal.before_applied": (1, 3, 6),
    }.items()
    for count in counts
]


@pytest.mark.parametrize("failpoint", CELLS)
def test_nothing_acknowledged_is_lost_or_done_twice(start, undisturbed, failpoint: str) -> None:
    front = start(failpoints=failpoint)
    model = front.model()
    results = train(front, model, steps=range(STEPS))
    assert [result["step"] for result in results] == list(range(1, STEPS + 1))
    assert all(result["metrics"]["num_backward_calls"] == 2 for result in results)
    assert_as_if_nothing_had_happened(front, model, undisturbed)
    assert front.num_starts == 2, "the failpoint was never reached"


SAVING = {
    "save.before_taken": 2,
    "save.after_taken": 5,
    "durable.before_publish": 6,
    "store.after_commit": 6,
}
"""Failpoints of the front and of its engine, and which time is the last. Of an engine's, so late that its
second life does not come so far."""
SAVES = ["save_weights_for_sampler", "save_weights", "save_weights_external"]


def _saved_while_training(front: FrontProcess) -> list[dict[str, Any]]:
    """Results of three saves behind each of three steps, which are only asked for at the end."""
    model, pending = front.model(), []
    for step in (0, 2, 4):
        pending += submit_step(front, model, step)[-1:]
        for seq, call in enumerate(SAVES, start=3 * step + 4):
            more = {"checkpoint_type": "delta"} if call == SAVES[0] else {}
            body = {"model_id": model, "seq_id": seq, "path": f"at-{step}"}
            pending.append(front.call(call, **body, **more)["request_id"])
    results = [front.result(request) for request in pending]
    assert front.status().error is None
    return [{k: v for k, v in each.items() if k not in ("metrics", "note")} for each in results]


@pytest.fixture(scope="module")
def saved_in_peace(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    front = FrontProcess(tmp_path_factory.mktemp("in-peace"))
    try:
        return _saved_while_training(front)
    finally:
        front.close()


@pytest.mark.parametrize("failpoint", SAVING)
def test_a_save_in_flight_when_its_engine_or_front_is_killed_has_the_same_bytes(
    start, saved_in_peace: list[dict[str, Any]], failpoint: str
) -> None:
    front = start(failpoints=f"{failpoint}=kill@{SAVING[failpoint]}")
    assert _saved_while_training(front) == saved_in_peace
    assert front.num_starts == 2 or front.status().engine_restarts == 1, "never reached"


def test_a_front_killed_while_it_takes_a_recovery_point_has_the_one_before(
    start, undisturbed
) -> None:
    front = start(failpoints="journal.before_fsync=kill@9", recovery_interval_s=0.0)
    model = front.model()
    train(front, model, steps=range(STEPS))
    assert_as_if_nothing_had_happened(front, model, undisturbed)
    assert front.num_starts == 2
    recovery = Path(front.spec.job_dir) / "recovery"
    assert len(list(recovery.iterdir())) <= 3


def test_an_engine_ends_with_its_front(start) -> None:
    front = start()
    front.model()
    ended = os.pidfd_open(front.events("engine_started")[-1]["pid"])
    front.stop(signal.SIGKILL)
    readable, _, _ = select.select([ended], [], [], 30)
    os.close(ended)
    assert readable == [ended]


def test_a_front_that_has_trained_holds_neither_torch_nor_transformers(start) -> None:
    front = start()
    train(front, front.model(), steps=range(1))
    assert "torch" not in Path(f"/proc/{front.process.pid}/maps").read_text()
    code = "import sys, homefire.trainer.front.__main__; print({'torch', 'transformers'} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "set()"


POOL = {"pooled": True, "mode": TrainerMode.LORA}
SESSIONS = [f"ts-{n:016x}" for n in range(3)]


def test_models_of_a_pool_that_take_turns_all_survive_the_deaths_of_engine_and_front(start) -> None:
    """Each model's digest is the one that it has when it trains alone and nothing dies: models with
    passes of their own, since sums in a shared pass have another order."""
    alone = []
    for session in SESSIONS:
        quiet = start(**POOL)
        model = quiet.pooled_model(session)
        train(quiet, model, steps=range(STEPS))
        alone.append(digest(quiet, model, seq=END))
        quiet.close()
    front = start(**POOL, failpoints="journal.before_applied=kill@7")
    models = [front.pooled_model(session) for session in SESSIONS]
    for step in range(STEPS):
        waiting = [request for model in models for request in submit_step(front, model, step)]
        if step == 2:
            front.kill_engine()
        if step == 4:
            front.stop(signal.SIGKILL)
        results = [front.result(request) for request in waiting]
        assert [result["step"] for result in results if "step" in result] == [step + 1] * 3
    assert [digest(front, model, seq=END) for model in models] == alone
    assert front.status().error is None
    assert front.num_starts == 3
