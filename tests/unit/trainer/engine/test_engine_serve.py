from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading

import pytest

from homefire.trainer.engine.engine import SlotEngine
from homefire.trainer.engine.fake import fake_engine, open_network
from homefire.trainer.engine.serve import serve
from homefire.wire.engine import (
    CloseSlot,
    Done,
    ExecutionPlan,
    Failure,
    ForwardBackward,
    ModelOpened,
    OpenModel,
    OpenSlot,
    Rows,
    Shutdown,
    SlotKind,
    SlotOpened,
    WeightsDigest,
)
from homefire.wire.engine_frames import decode_reply, encode_request, read_frame


@pytest.fixture
def open_model(tiny_directory, tmp_path):
    return OpenModel(
        model_dir=str(tiny_directory),
        base_model="tiny",
        store_root=str(tmp_path / "store"),
        account="local",
        job="job-1",
        threads=1,
        max_context_length=64,
    )


@pytest.fixture
def connect():
    """Serves an engine in a thread; the test's end of the socket, closed and joined at the end."""
    ends = []

    def connect(engine):
        front, back = socket.socketpair()
        thread = threading.Thread(target=serve, args=(back, engine))
        thread.start()
        ends.append((front, back, thread))
        return front

    yield connect
    for front, back, thread in ends:
        front.close()
        thread.join(10)
        back.close()
        assert not thread.is_alive()


def ask(connection, message, arrays=None):
    connection.sendall(encode_request(message, arrays))
    return decode_reply(read_frame(connection))


def test_requests_are_answered_in_order_over_a_socket(connect, open_model, make_batch):
    front = connect(fake_engine())
    assert isinstance(ask(front, open_model)[0], ModelOpened)
    assert isinstance(ask(front, OpenSlot(slot="policy", kind=SlotKind.FULL))[0], SlotOpened)
    request = ForwardBackward(
        slot="policy",
        loss_fn="cross_entropy",
        loss_fn_config={},
        plan=ExecutionPlan(micro_batches=[[0, 1, 2]], threads=1),
    )
    rows, arrays = ask(front, request, make_batch())
    assert isinstance(rows, Rows)
    assert arrays["logprobs"].shape == (17, 1)


def test_a_user_error_is_a_failure_and_the_loop_goes_on(connect, open_model):
    front = connect(fake_engine())
    ask(front, open_model)
    reply, _ = ask(front, CloseSlot("never"))
    assert isinstance(reply, Failure)
    assert (reply.error.code, reply.error.category) == ("invalid_argument", "user")
    assert isinstance(ask(front, OpenSlot(slot="policy", kind=SlotKind.FULL))[0], SlotOpened)


def test_a_bug_is_a_server_failure_with_its_traceback_in_the_log(connect, open_model, caplog):
    def broken(request):
        raise ZeroDivisionError("planted")

    front = connect(SlotEngine(broken))
    reply, _ = ask(front, open_model)
    assert isinstance(reply, Failure)
    assert (reply.error.code, reply.error.category) == ("engine_failed", "server")
    assert "OpenModel broke: ZeroDivisionError: planted" in reply.error.message
    assert "Traceback" in caplog.text
    assert isinstance(ask(front, WeightsDigest("policy"))[0], Failure)


def test_an_unreadable_request_is_a_failure(connect):
    front = connect(fake_engine())
    frame = encode_request(Shutdown())
    front.sendall(frame[:-1] + b"\xff")
    reply, _ = decode_reply(read_frame(front))
    assert isinstance(reply, Failure)
    assert reply.error.code == "engine_failed"


def test_shutdown_is_answered_and_ends_the_loop(connect):
    front = connect(fake_engine())
    assert isinstance(ask(front, Shutdown())[0], Done)


def test_a_front_that_hangs_up_before_the_reply_ends_the_loop(open_model):
    front, back = socket.socketpair()

    def hang_up(request):
        front.close()
        return open_network(request)

    front.sendall(encode_request(open_model))
    serve(back, SlotEngine(hang_up))
    back.close()


@pytest.mark.parametrize("goodbye", ["shutdown", "hang up"])
def test_the_fake_engine_process_starts_without_torch_and_exits_cleanly(open_model, goodbye):
    front, back = socket.socketpair()
    script = (
        "import sys, runpy\n"
        "sys.argv = ['engine', '--fd', sys.argv[1], '--kind', 'fake']\n"
        "runpy.run_module('homefire.trainer.engine', run_name='__main__')\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    with front, back:
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(back.fileno())],
            pass_fds=[back.fileno()],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        back.close()
        assert ask(front, open_model)[0].pid == process.pid
        if goodbye == "shutdown":
            assert isinstance(ask(front, Shutdown())[0], Done)
        front.close()
        assert process.wait(20) == 0


def test_an_idle_engine_is_asked_again_when_what_it_keeps_expires(connect, open_model):
    due, all_freed = [0.0, 0.0], threading.Event()

    class Keeping(SlotEngine):
        def free_expired(self):
            if due:
                return due.pop()
            all_freed.set()
            return None

    front = connect(Keeping(open_network))
    assert all_freed.wait(10)
    assert isinstance(ask(front, open_model)[0], ModelOpened)
