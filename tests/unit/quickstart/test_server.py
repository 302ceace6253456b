import signal
import sys

import pytest

from homefire.foundation.home import Home
from homefire.quickstart.server import OwnServer
from homefire.wire.errors import Unavailable

STAND_IN = """
import signal, sys
def stop(*_):
    print("stopping", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
print("starting", flush=True)
print("homefire is ready at http://127.0.0.1:4321", flush=True)
signal.pause()
"""


@pytest.fixture
def start(tmp_path):
    """Starts a script in the place of `homefire up`."""

    def make(script):
        home = tmp_path / "home"
        Home(home).prepare()
        return OwnServer([sys.executable, "-c", script], home, tmp_path / "server.log")

    return make


def test_the_address_is_what_the_server_announced_with_the_key_of_its_home(start, tmp_path):
    server = start(STAND_IN)
    try:
        address = server.wait_ready()
    finally:
        server.stop()

    assert address.base_url == "http://127.0.0.1:4321"
    assert address.api_key == Home(tmp_path / "home").api_key()


def test_a_stopped_server_was_asked_to_and_has_left_its_output(start, tmp_path):
    server = start(STAND_IN)
    server.wait_ready()

    assert server.stop() == 0

    assert (tmp_path / "server.log").read_text().splitlines()[-1] == "stopping"


def test_a_server_that_does_not_start_is_an_error_with_its_last_words(start):
    server = start("import sys; sys.exit('error: port 8700 is in use')")

    with pytest.raises(Unavailable, match="port 8700 is in use"):
        server.wait_ready()
    server.stop()


def test_a_server_that_was_killed_can_be_stopped_again(start):
    server = start(STAND_IN)
    server.wait_ready()
    server.kill()

    assert server.stop() == -signal.SIGKILL
