"""Over a hundred SIGKILLs, each at another place of another operation, under the real `tinker` client."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from faults.conftest import StartWalk
from homefire.wire.specs import EngineKind

tinker = pytest.importorskip("tinker")

from faults.kill_cells import (  # noqa: E402
    Cell,
    Op,
    Phase,
    assert_as_if_nothing_had_happened,
    fake_cells,
    torch_cells,
)
from faults.planted_front import BUGS  # noqa: E402

pytestmark = [
    # tinker leaves its sockets to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:DEPRECATED. TrainingClient.load_state:FutureWarning"),
]


def test_a_client_notices_none_of_the_kills_of_the_fake_engine(start_walk: StartWalk) -> None:
    cells = fake_cells()
    assert len(set(cells)) == len(cells) >= 85
    quiet, killed = start_walk(cells, armed=False), start_walk(cells, armed=True)
    assert quiet.num_kills == 0
    assert killed.num_kills >= len(cells)
    assert_as_if_nothing_had_happened(killed, quiet)


def test_a_client_notices_none_of_the_kills_of_the_real_engine(start_walk: StartWalk) -> None:
    cells = torch_cells()
    assert len(set(cells)) == len(cells) >= 15
    quiet = start_walk(cells, armed=False, engine=EngineKind.TORCH)
    killed = start_walk(cells, armed=True, engine=EngineKind.TORCH)
    assert killed.num_kills >= len(cells)
    assert_as_if_nothing_had_happened(killed, quiet)


A_FEW = [
    Cell("journal.before_write", Op.BACKWARD, Phase.TAKEN_ON),
    Cell("journal.after_fsync_before_ack", Op.BACKWARD, Phase.TAKEN_ON),
    Cell("journal.before_applied", Op.STEP, Phase.APPLIED),
    Cell("front.before_result", Op.STEP, Phase.ANSWERED),
    Cell("engine.before_reply", Op.STEP, Phase.RUN),
]


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.__name__)
def test_a_planted_bug_is_found(start_walk: StartWalk, bug: Callable[[], None]) -> None:
    quiet = start_walk(A_FEW, armed=False)
    try:
        killed = start_walk(A_FEW, armed=True, bug=bug.__name__)
    except tinker.RequestFailedError:
        return  # the client was told that a request failed
    with pytest.raises(AssertionError):
        assert_as_if_nothing_had_happened(killed, quiet)


def test_without_a_bug_the_same_few_cells_are_unnoticed(start_walk: StartWalk) -> None:
    quiet, killed = start_walk(A_FEW, armed=False), start_walk(A_FEW, armed=True)
    assert_as_if_nothing_had_happened(killed, quiet)
