"""Ending with the process that this one works for.

An engine that computes, or waits for another rank, does not read its socket, so it would not notice
that its front has gone: it would go on beside the engine that the next front starts. A thread that
does nothing else notices.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import threading

log = logging.getLogger(__name__)

GRACE_S = 5.0
"""For ending in the ordinary way."""
EXIT_STATUS = 3


def end_with_peer(connection: socket.socket, *, grace_s: float = GRACE_S) -> None:
    """From now on this process does not outlive the other end of `connection`. Does not block."""
    watched = socket.socket(fileno=os.dup(connection.fileno()))
    thread = threading.Thread(target=_watch, args=(watched, grace_s), name="peer", daemon=True)
    thread.start()


def _watch(connection: socket.socket, grace_s: float) -> None:
    with connection:
        poller = select.poll()
        poller.register(connection, 0)  # nothing but the hang-up, which is always reported
        poller.poll()
    threading.Event().wait(grace_s)
    log.error("the other end has gone, and this process is still busy: it ends")
    logging.shutdown()
    os._exit(EXIT_STATUS)
