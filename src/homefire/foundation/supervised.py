"""A service that outlives its supervisor: it gives the next one time to take over, then ends cleanly."""

from __future__ import annotations

import logging
import os
import select
import signal
import threading
import time

log = logging.getLogger(__name__)
TAKE_OVER_WITHIN_S = 30.0
"""A service manager starts a killed `homefire up` again in less; the new one kills this process, and
what it started is adopted as it runs."""
_LOOK_INTERVAL_S = 1.0
"""Where the kernel has no pidfd (macOS)."""


def end_with_supervisor(*, take_over_within_s: float = TAKE_OVER_WITHIN_S) -> None:
    """Watches the parent of this process on a thread. When it has ended and nobody took over, this
    process gets the SIGTERM that its supervisor would have sent, so that nothing is left running."""
    parent = os.getppid()
    threading.Thread(target=_watch, args=(parent, take_over_within_s), daemon=True).start()


def _watch(parent: int, take_over_within_s: float) -> None:
    _wait_for_end_of(parent)
    log.warning(
        "the supervisor (process %d) has ended; stopping in %g s unless another takes over",
        parent,
        take_over_within_s,
    )
    time.sleep(take_over_within_s)
    os.kill(os.getpid(), signal.SIGTERM)


def _wait_for_end_of(parent: int) -> None:
    try:
        descriptor = os.pidfd_open(parent)
    except ProcessLookupError:
        return
    except (AttributeError, OSError):
        while os.getppid() == parent:
            time.sleep(_LOOK_INTERVAL_S)
        return
    if os.getppid() == parent:  # else it ended before, and its pid may be another's
        select.select([descriptor], [], [])
    os.close(descriptor)
