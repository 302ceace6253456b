"""A `homefire up` of our own, for as long as the quickstart runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from homefire.foundation.home import Home
from homefire.wire.errors import Unavailable

READY = "homefire is ready at "
_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 90.0
_OUTPUT_TIMEOUT_S = 5.0
_TAIL_LINES = 20


@dataclass(frozen=True)
class Address:
    """Example: Address("http://127.0.0.1:8700", "tml-…")."""

    base_url: str
    api_key: str


class OwnServer:
    """The process of `homefire up`, in a session of its own: a Ctrl-C here reaches us alone, and we
    stop it in order. What it prints goes to `log`."""

    def __init__(self, command: Sequence[str], home: Path, log: Path) -> None:
        self.home = Home(home)
        self._log = log
        self._lines: list[str] = []
        self._settled = threading.Event()
        self._process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        self._reader = threading.Thread(target=self._follow, name="homefire-up-output", daemon=True)
        self._reader.start()

    def wait_ready(self) -> Address:
        """Unavailable, with the end of its output, when it does not get ready."""
        self._settled.wait(_START_TIMEOUT_S)
        ready = [line for line in self._lines if line.startswith(READY)]
        if not ready:
            tail = "\n".join(self._lines[-_TAIL_LINES:])
            raise Unavailable(f"homefire did not start:\n{tail}", hint=f"see {self._log}")
        return Address(ready[-1].removeprefix(READY).strip(), self.home.api_key())

    def stop(self) -> int:
        """Asks it to stop, and insists after a while; its exit status."""
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()
        self._reader.join(_OUTPUT_TIMEOUT_S)
        return self._process.returncode

    def kill(self) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _follow(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as output, self._log.open("w", encoding="utf-8") as log:
            for line in output:
                log.write(line)
                log.flush()
                self._lines.append(line.rstrip("\n"))
                if line.startswith(READY):
                    self._settled.set()
        self._settled.set()


@contextmanager
def own_server(
    home: Path | None,
    log: Path,
    *,
    model_roots: Sequence[Path] = (),
    keep_journals: bool = False,
) -> Iterator[OwnServer]:
    """Starts it at once; without `home` it lives in a temporary one."""
    with _home_or_temporary(home) as directory:
        options = ["--keep-journals"] if keep_journals else []
        server = OwnServer([*_command(directory, model_roots), *options], directory, log)
        try:
            yield server
        finally:
            server.stop()


@contextmanager
def _home_or_temporary(home: Path | None) -> Iterator[Path]:
    if home is not None:
        yield home
        return
    with tempfile.TemporaryDirectory(prefix="homefire-quickstart-") as directory:
        yield Path(directory) / "home"


def _command(home: Path, model_roots: Sequence[Path]) -> list[str]:
    roots = [word for root in model_roots for word in ("--model-root", str(root))]
    module = [sys.executable, "-m", "homefire.cli.main", "up"]
    return [*module, "--home", str(home), "--port", "0", *roots]
