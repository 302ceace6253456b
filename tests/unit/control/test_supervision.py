from __future__ import annotations

from homefire.control.db.rows import Supervision
from homefire.control.supervision import (
    CRASH_LIMIT,
    HEALTHY_S,
    after_death,
    after_request,
    delay_s,
    gave_up,
)


def test_the_first_death_costs_no_delay_and_the_next_ones_double_up_to_a_bound() -> None:
    delays = [delay_s(restarts) for restarts in range(1, 10)]
    assert delays == [0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 10.0, 10.0]


def test_a_process_is_given_up_after_so_many_deaths_in_a_row() -> None:
    supervision = Supervision()
    for death in range(1, CRASH_LIMIT + 1):
        assert not gave_up(supervision)
        supervision = after_death(supervision, now=float(death), failure="exited with 1")
    assert gave_up(supervision)


def test_a_healthy_stretch_wipes_the_slate() -> None:
    worn = Supervision(restarts=CRASH_LIMIT - 1, ready_at=0.0)
    assert after_death(worn, now=HEALTHY_S, failure="").restarts == 1
    assert gave_up(after_death(worn, now=HEALTHY_S - 1, failure=""))


def test_what_the_user_asks_for_again_starts_with_a_clean_slate() -> None:
    given_up = Supervision(restarts=CRASH_LIMIT, not_before=99.0, failure="exited with 1")
    assert after_request(given_up) == Supervision()
