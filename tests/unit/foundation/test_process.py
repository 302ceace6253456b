from __future__ import annotations

import os
import signal
import subprocess
import sys

from homefire.foundation.process import ProcessId, identify, is_alive, send_signal, this_process


def sleeper() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)


def test_this_process_is_alive_and_recognised():
    assert this_process().pid == os.getpid()
    assert is_alive(this_process())


def test_a_pid_with_another_start_time_is_another_process():
    me = this_process()
    assert not is_alive(ProcessId(me.pid, me.start_ticks + 1))


def test_a_signal_is_never_sent_to_a_process_that_took_over_the_pid():
    with sleeper() as child:
        real = identify(child.pid)
        assert real is not None
        assert not send_signal(ProcessId(child.pid, real.start_ticks + 1), signal.SIGKILL)
        assert child.poll() is None
        assert send_signal(real, signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL


def test_a_zombie_is_not_alive():
    with sleeper() as child:
        process = identify(child.pid)
        assert process is not None
        os.kill(child.pid, signal.SIGKILL)
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert not is_alive(process)
