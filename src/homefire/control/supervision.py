"""Keeping one process alive: back-off, and when to give up. Pure."""

from __future__ import annotations

import msgspec

from homefire.control.db.rows import Supervision
from homefire.launch import ProcessRecord

CRASH_LIMIT = 5
"""Deaths in a row after which a process is not started again."""
HEALTHY_S = 60.0
"""A process that was ready for so long has a clean slate."""
_FIRST_DELAY_S = 0.25
_LONGEST_DELAY_S = 10.0


def delay_s(restarts: int) -> float:
    """Seconds before the next start: at once after the first death, then doubling."""
    if restarts <= 1:
        return 0.0
    return min(_LONGEST_DELAY_S, _FIRST_DELAY_S * 2.0 ** (restarts - 2))


def gave_up(supervision: Supervision) -> bool:
    return supervision.process is None and supervision.restarts >= CRASH_LIMIT


def after_start(supervision: Supervision, record: ProcessRecord) -> Supervision:
    """`record` has no pid while the start is only intended."""
    return msgspec.structs.replace(supervision, process=record, ready_at=None, caught_up=False)


def after_request(supervision: Supervision) -> Supervision:
    """The user asked to go on: earlier deaths do not count."""
    return msgspec.structs.replace(supervision, restarts=0, not_before=0.0, failure="")


def after_ready(supervision: Supervision, *, now: float) -> Supervision:
    return msgspec.structs.replace(supervision, ready_at=supervision.ready_at or now)


def after_death(supervision: Supervision, *, now: float, failure: str) -> Supervision:
    was_healthy = supervision.ready_at is not None and now - supervision.ready_at >= HEALTHY_S
    restarts = 1 if was_healthy else supervision.restarts + 1
    return Supervision(restarts=restarts, not_before=now + delay_s(restarts), failure=failure)


def after_catching_up(supervision: Supervision) -> Supervision:
    return msgspec.structs.replace(supervision, caught_up=True)


def after_clean_stop() -> Supervision:
    """Control stopped the process itself, so the next start begins afresh."""
    return Supervision()
