"""Shared by every layer: a real `homefire up`, started as a user would."""

from __future__ import annotations

import contextlib
import gc
import os
import secrets
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import hypothesis
import pytest

from homefire.foundation.home import Home

# A slow machine is no failure.
hypothesis.settings.register_profile(
    "homefire", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("homefire")

_MARK = "HOMEFIRE_TEST_RUN"
_READY = "homefire is ready at "


class RunningHomefire:
    """`homefire up` on a home of its own. Everything it started inherits a mark that finds it."""

    def __init__(self, home: Path, *, engine: str, arguments: Sequence[str], env: dict[str, str]):
        self.home = home
        self.url = ""
        self._is_stopping = False
        self._mark = secrets.token_hex(8)
        self._arguments = ["--engine", engine, "--port", "0", *arguments]
        self._environment = {**os.environ, "OMP_NUM_THREADS": "1", **env, _MARK: self._mark}
        self.process: subprocess.Popen[str]
        self.start()

    @property
    def api_key(self) -> str:
        return Home(self.home).api_key()

    def start(self) -> None:
        self._is_stopping = False
        command = [sys.executable, "-m", "homefire.cli.main", "up", "--home", str(self.home)]
        with (self.home.parent / f"{self.home.name}.stderr").open("ab") as stderr:
            self.process = subprocess.Popen(
                [*command, *self._arguments],
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=self._environment,
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith(_READY), f"not ready: {line!r}\n{self.messages()}"
        self.url = line.removeprefix(_READY).strip()

    def stop(self, number: signal.Signals = signal.SIGTERM, *, timeout_s: float = 120.0) -> int:
        """The exit status. Does nothing the second time."""
        self.begin_stop(number)
        status = self.process.wait(timeout_s)
        if self.process.stdout is not None:
            self.process.stdout.close()
        return status

    def begin_stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """Sends one signal: a second one would be heard as hurry."""
        if not self._is_stopping and self.process.poll() is None:
            self.process.send_signal(number)
        self._is_stopping = True

    def restart(self) -> RunningHomefire:
        """A clean stop and a new `up` on the same home; the port may change."""
        self.stop()
        assert self.processes() == []
        self.start()
        return self

    def cli(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Runs `homefire WORDS --home HOME`."""
        run = subprocess.run(
            [sys.executable, "-m", "homefire.cli.main", *words, "--home", str(self.home)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert not check or run.returncode == 0, run.stderr
        return run

    def messages(self) -> str:
        """What the supervisor said on standard error."""
        return (self.home.parent / f"{self.home.name}.stderr").read_text()

    def processes(self) -> list[int]:
        """Pids of everything that this `up` started and that still runs, itself included."""
        mark = f"{_MARK}={self._mark}".encode()
        found = []
        for entry in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if mark in entry.read_bytes().split(b"\0"):
                    found.append(int(entry.parent.name))
        return found

    def end(self) -> list[int]:
        """Stops, kills whatever is left, and returns the pids that should not have been there."""
        try:
            self.stop()
        finally:
            left = [pid for pid in self.processes() if not _gone(pid, within_s=5.0)]
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        return left


def _gone(pid: int, *, within_s: float) -> bool:
    """Engines end when their front's socket closes, which is a moment after the front ended."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], within_s)[0])
    finally:
        os.close(descriptor)


pytest_plugins = ["skips"]

StartHomefire = Callable[..., RunningHomefire]


LONGEST_FIRST = (
    "contract/test_planted_bugs",
    "contract/test_migration",
    "contract/test_seed_example",
    "contract/test_fireworks_transitions",
    "contract/test_fireworks_training",
    "contract/test_fireworks_managed",
    "contract/test_fireworks_deployments",
    "contract/test_fireworks_sampling",
    "contract/test_lm_eval",
    "contract/test_matrix",
    "contract/test_tinker_sampling",
    "contract/test_openai",
    "journeys/test_as_a_newcomer",
    "journeys/test_control_plane",
    "journeys/test_reconnect_and_branch",
    "journeys/test_tinker_management",
    "journeys/test_weight",
    "journeys/test_root_plane",
    "journeys/test_several_replicas",
    "journeys/test_several_ranks",
    "faults/test_chaos_quickstart",
    "faults/test_kill_cells",
    "faults/test_power_cuts",
    "faults/test_lossy_network",
    "faults/test_kill_and_resume",
    "faults/test_stop_and_up",
    "faults/test_front_deaths",
    "parity/test_one_set_of_numbers",
    "parity/test_trainer_parity",
    "unit/trainer/front/test_pooled",
    "unit/cli/test_up",
    "unit/checkpoints/test_disk_faults",
    "unit/checkpoints/test_object_store",
    "unit/checkpoints/test_model_import",
)
"""Modules that take longest, as measured: begun first, they leave no worker alone at the end."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    _note_open_sockets(items)
    if hasattr(config, "workerinput"):
        items.sort(key=_turn)  # stable: the tests of a module keep their order


def _turn(item: pytest.Item) -> int:
    module = item.path.relative_to(Path(__file__).parent).with_suffix("").as_posix()
    return LONGEST_FIRST.index(module) if module in LONGEST_FIRST else len(LONGEST_FIRST)


def _note_open_sockets(items: list[pytest.Item]) -> None:
    """tinker never closes the socket of its first `/client/config` request (0.38)."""
    for item in items:
        if "homefire_up" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"))


@pytest.fixture(scope="module")
def homefire_up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartHomefire]:
    """A factory of running homefires; each is stopped with its module and must leave nothing.

    Example: `server = homefire_up(engine="fake", arguments=["--alias", "a/b=tiny"])`.
    """
    yield from _homefires(tmp_path_factory)


@pytest.fixture(scope="session")
def shared_homefire_up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartHomefire]:
    """The same, stopped after the last test: for servers that several modules share."""
    yield from _homefires(tmp_path_factory)


def _homefires(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartHomefire]:
    running: list[RunningHomefire] = []

    def start(
        home: Path | None = None,
        *,
        engine: str = "torch",
        arguments: Sequence[str] = (),
        env: dict[str, str] | None = None,
    ) -> RunningHomefire:
        home = home or tmp_path_factory.mktemp("home")
        server = RunningHomefire(home, engine=engine, arguments=arguments, env=env or {})
        running.append(server)
        return server

    yield start
    gc.collect()
    for server in running:
        server.begin_stop()  # of all before the wait for the first: they stop side by side
    left = {str(server.home): server.end() for server in running}
    assert not any(left.values()), f"still running after the stop: {left}"
