from __future__ import annotations

from homefire.control.capacity import Capacity, Ledger, never_fits
from homefire.control.db.rows import Need

GIB = 1 << 30


def test_what_fits_exactly_fits_and_one_more_is_told_what_is_free() -> None:
    ledger = Ledger(Capacity(threads=4, memory_bytes=8 * GIB), 3, 4 * GIB)
    assert ledger.shortfall(Need(1, 4 * GIB)) is None
    assert ledger.shortfall(Need(2, 1)) == "waiting for 2 engine threads: 1 of 4 are free"
    assert ledger.shortfall(Need(1, 5 * GIB)) == (
        "waiting for 5.0 GiB of memory: 4.0 GiB of 8.0 GiB are free"
    )


def test_zeros_take_twice_the_cores_and_most_of_the_memory() -> None:
    machine = Capacity.of_machine()
    assert machine.threads >= 2
    assert machine.memory_bytes > 0
    assert Capacity.of_machine(threads=3, memory_bytes=7) == Capacity(3, 7)


def test_what_exceeds_the_whole_machine_never_fits() -> None:
    small = Capacity(threads=1, memory_bytes=GIB)
    assert never_fits(small, Need(1, GIB)) is None
    assert "2 engine threads" in (never_fits(small, Need(2, GIB)) or "")
