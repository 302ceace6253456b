"""A busy engine ends with its front: a real process, whose other end closes."""

from __future__ import annotations

import socket
import subprocess
import sys

BUSY = """
import socket, sys, threading
from homefire.trainer.engine.peer import end_with_peer
connection = socket.socket(fileno=int(sys.argv[1]))
end_with_peer(connection, grace_s=0.0)
connection.sendall(b"busy")
threading.Event().wait()
"""


def test_a_process_that_never_reads_ends_when_the_other_end_closes() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        descriptor = theirs.fileno()
        process = subprocess.Popen(
            [sys.executable, "-c", BUSY, str(descriptor)], pass_fds=[descriptor]
        )
        theirs.close()
        assert ours.recv(4) == b"busy"
        assert process.poll() is None
        ours.close()
        assert process.wait(30) == 3
