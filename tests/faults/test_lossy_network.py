"""Requests and replies that are lost, doubled, held, cut and reordered, under the real `tinker` client."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from faults.chaos_proxy import Mischief, drawn
from faults.conftest import StartWalk

tinker = pytest.importorskip("tinker")

from faults.kill_cells import (  # noqa: E402
    Cell,
    Op,
    Phase,
    assert_as_if_nothing_had_happened,
)
from faults.planted_front import NETWORK_BUGS  # noqa: E402

pytestmark = [
    # tinker leaves its sockets to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:DEPRECATED. TrainingClient.load_state:FutureWarning"),
]
SEEDS = range(4)
SHARE = 0.5
MIN_FAULTS = 300
ROUND = (Op.CREATE, Op.BACKWARD, Op.STEP, Op.FORWARD, Op.SAVE, Op.SNAPSHOT, Op.LOAD, Op.STEP)
CELLS = [Cell("", op, Phase.RUN) for op in ROUND * 6]


def test_the_schedule_is_the_seed_s_alone_and_has_every_kind() -> None:
    first, again, other = drawn(1, share=0.5), drawn(1, share=0.5), drawn(2, share=0.5)
    cells = [(name, n) for name in ("optim_step", "retrieve_future") for n in range(100)]
    assert [first(*cell) for cell in cells] == [again(*cell) for cell in cells]
    assert [first(*cell) for cell in cells] != [other(*cell) for cell in cells]
    assert {first(*cell) for cell in cells} == {None, *Mischief}


def test_a_client_notices_none_of_hundreds_of_network_faults(start_walk: StartWalk) -> None:
    """Several clients side by side: most of the time is their waiting before they try again."""
    quiet = start_walk(CELLS, armed=False)
    with ThreadPoolExecutor(len(SEEDS)) as together:
        runs = [
            together.submit(start_walk, CELLS, armed=False, mischief=drawn(seed, share=SHARE))
            for seed in SEEDS
        ]
    done = sum((run.result().proxy.done for run in runs), start=type(quiet.proxy.done)())
    print(f"seeds {list(SEEDS)}: {dict(done)}")
    for run in runs:
        assert_as_if_nothing_had_happened(run.result(), quiet)
    assert done.total() >= MIN_FAULTS
    assert min(done[kind] for kind in Mischief) >= 15


KILLS = [
    Cell("journal.after_fsync_before_ack", Op.BACKWARD, Phase.TAKEN_ON),
    Cell("engine.before_reply", Op.STEP, Phase.RUN),
    Cell("journal.before_applied", Op.STEP, Phase.APPLIED),
    Cell("front.before_result", Op.FORWARD, Phase.ANSWERED),
    Cell("journal.before_fsync", Op.SNAPSHOT, Phase.APPLIED, 2),
]


def test_kills_and_network_faults_together_go_unnoticed(start_walk: StartWalk) -> None:
    quiet = start_walk(KILLS, armed=False)
    killed = start_walk(KILLS, armed=True, mischief=drawn(7, share=SHARE))
    assert killed.num_kills >= len(KILLS)
    assert killed.proxy.done.total() > 5
    assert_as_if_nothing_had_happened(killed, quiet)


@pytest.mark.parametrize("bug", NETWORK_BUGS, ids=lambda bug: bug.__name__)
def test_a_planted_bug_is_found(start_walk: StartWalk, bug: Callable[[], None]) -> None:
    def lose(name: str, number: int) -> Mischief | None:
        return Mischief.LOSE if number == 2 else None

    cells = CELLS[1:4]
    quiet = start_walk(cells, armed=False)
    try:
        lossy = start_walk(cells, armed=False, bug=bug.__name__, mischief=lose)
    except tinker.RequestFailedError:
        return  # the client was told that a request failed
    with pytest.raises(AssertionError):
        assert_as_if_nothing_had_happened(lossy, quiet)
