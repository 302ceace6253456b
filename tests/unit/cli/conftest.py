"""A home whose `up` record points at a scripted control plane, and the command line on it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import msgspec
import pytest

from homefire.cli.main import main
from homefire.foundation.home import Home, UpRecord
from homefire.foundation.process import ProcessId, this_process


@dataclass
class Stub:
    """Answers by `METHOD path`; a callable gets the query and returns the answer."""

    answers: dict[str, Any] = field(default_factory=dict)
    seen: list[str] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    url: str = ""

    def answer(self, method: str, target: str, key: str) -> tuple[int, bytes]:
        parts = urlsplit(target)
        self.seen.append(f"{method} {target}")
        if not key.startswith("tml-"):
            return 401, b"{}"
        found = self.answers.get(f"{method} {parts.path}")
        if found is None:
            error = {"code": "not_found", "message": "no such thing (look)", "hint": "look"}
            return 404, json.dumps({"error": error}).encode()
        if callable(found):
            found = found({name: values[0] for name, values in parse_qs(parts.query).items()})
        return 200, found if isinstance(found, bytes) else json.dumps(found).encode()


@pytest.fixture
def stub() -> Iterator[Stub]:
    stub = Stub({"GET /v1/accounts": {"accounts": [{"name": "accounts/local"}]}})

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            length = int(self.headers.get("content-length") or 0)
            if length:
                stub.bodies.append(self.rfile.read(length))
            status, body = stub.answer(self.command, self.path, self.headers.get("x-api-key", ""))
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _answer

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        stub.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield stub
        server.shutdown()
        thread.join()


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path / "home")
    home.prepare()
    return home


@pytest.fixture
def publish(home: Home) -> Callable[..., None]:
    """Writes the record of a `homefire up`, by default of a living process."""

    def write(url: str, process: ProcessId | None = None) -> None:
        record = UpRecord(process or this_process(), url)
        home.up_file.write_bytes(msgspec.json.encode(record))

    return write


@pytest.fixture
def control(stub: Stub, publish: Callable[..., None]) -> Stub:
    """A running control plane that gives the answers that a test puts into it."""
    publish(stub.url)
    return stub


@dataclass
class Outcome:
    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def homefire(home: Home, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Runs a command line; `--home` is added."""

    def run(*words: str) -> Outcome:
        try:
            status = main([*words, "--home", str(home.root)])
        except SystemExit as exc:
            status = int(exc.code or 0)
        captured = capsys.readouterr()
        return Outcome(status, captured.out, captured.err)

    return run
