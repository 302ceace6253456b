"""The layout of a homefire home directory, and who holds it.

HOME/
├── VERSION            format of this layout
├── api_key            the user's key, mode 0600
├── download_key       signs links to checkpoints' files, mode 0600
├── control.sqlite3    jobs, deployments, models
├── models/            the default model root; `tiny` is made here, promoted models land here
├── store_url          of an object store, where checkpoints are instead of in `store`
├── store/             <account>/<job>/<slot>/{sampler,state}/<name>/
├── prompt_sets/       what evaluations asked, by digest
├── jobs/<job>/        journal/, recovery/, events.jsonl, spec.json, *.log
├── deployments/<d>/<replica>/   events.jsonl, spec.json, replica.log
└── run/               up.lock, up.json, routes.json, specs and sockets of gateway and control
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import msgspec

from homefire.foundation.durable import write_file, write_private
from homefire.foundation.process import ProcessId, this_process
from homefire.wire.errors import HomeBusy, HomeTooNew

HOME_VERSION = 1
HOME_VARIABLE = "HOMEFIRE_HOME"
_LONGEST_SOCKET_PATH = 100


@dataclass(frozen=True)
class Home:
    root: Path

    @classmethod
    def default(cls) -> Path:
        return Path(os.environ.get(HOME_VARIABLE) or Path.home() / ".homefire")

    @property
    def api_key_file(self) -> Path:
        return self.root / "api_key"

    @property
    def download_key_file(self) -> Path:
        return self.root / "download_key"

    @property
    def database(self) -> Path:
        return self.root / "control.sqlite3"

    @property
    def models(self) -> Path:
        return self.root / "models"

    @property
    def store(self) -> Path:
        return self.root / "store"

    @property
    def store_url_file(self) -> Path:
        return self.root / "store_url"

    @property
    def store_root(self) -> str:
        """Where this home's checkpoints are: its own directory, or the object store that the first
        `homefire up --store` named."""
        try:
            return self.store_url_file.read_text().strip()
        except FileNotFoundError:
            return str(self.store)

    @property
    def prompt_sets(self) -> Path:
        """Prompts of evaluations, by digest; made with the first."""
        return self.root / "prompt_sets"

    @property
    def run(self) -> Path:
        return self.root / "run"

    @property
    def routes_file(self) -> Path:
        return self.run / "routes.json"

    @property
    def up_file(self) -> Path:
        """Who runs `homefire up` on this home, and where it listens."""
        return self.run / "up.json"

    def job(self, job: str) -> Path:
        return self.root / "jobs" / job

    def replica(self, deployment: str, replica: int) -> Path:
        return self.root / "deployments" / deployment / str(replica)

    def socket(self, name: str) -> str:
        """A path for a Unix socket in a 0700 directory, short enough for the kernel's limit."""
        path = self.run / f"{name}.sock"
        if len(os.fsencode(path)) <= _LONGEST_SOCKET_PATH:
            return str(path)
        digest = hashlib.sha256(os.fsencode(self.root.resolve())).hexdigest()[:12]
        short = Path(tempfile.gettempdir()) / f"homefire-{os.getuid()}-{digest}"
        short.mkdir(mode=0o700, exist_ok=True)
        if short.stat().st_uid != os.getuid() or short.stat().st_mode & 0o077:
            raise PermissionError(f"{short} is not a private directory of this user")
        return str(short / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.sock")

    def prepare(self) -> None:
        """Makes the directories and the keys on first use; refuses a home from a newer version."""
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        version = self.root / "VERSION"
        if version.exists():
            found = int(version.read_text().strip() or 0)
            if found > HOME_VERSION:
                raise HomeTooNew(
                    f"{self.root} has format {found}, this homefire knows up to {HOME_VERSION}",
                    hint="upgrade homefire, or choose another home with --home",
                )
        else:
            write_file(version, f"{HOME_VERSION}\n".encode())
        for directory in (self.models, self.store, self.root / "jobs", self.root / "deployments"):
            directory.mkdir(exist_ok=True)
        self.run.mkdir(mode=0o700, exist_ok=True)
        if not self.api_key_file.exists():
            write_private(self.api_key_file, f"tml-{secrets.token_urlsafe(24)}\n".encode())
        if not self.download_key_file.exists():
            write_private(self.download_key_file, secrets.token_bytes(32))

    def api_key(self) -> str:
        return self.api_key_file.read_text().strip()

    def download_key(self) -> bytes:
        return self.download_key_file.read_bytes()


class UpRecord(msgspec.Struct, frozen=True):
    """Content of `run/up.json`: who holds the home and where to reach it."""

    process: ProcessId
    url: str


class HomeLock:
    """Held by `homefire up` for as long as it runs; the kernel frees it when the process dies."""

    def __init__(self, home: Home) -> None:
        self._home = home
        self._descriptor = -1

    def __enter__(self) -> HomeLock:
        descriptor = os.open(self._home.run / "up.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            os.close(descriptor)
            raise HomeBusy(
                f"{self._home.root} is held by {self._holder()}",
                hint="stop that process, or choose another home with --home",
            ) from exc
        self._descriptor = descriptor
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._descriptor)

    def publish(self, url: str) -> None:
        record = UpRecord(this_process(), url)
        write_file(self._home.up_file, msgspec.json.encode(record))

    def _holder(self) -> str:
        try:
            record = msgspec.json.decode(self._home.up_file.read_bytes(), type=UpRecord)
        except (OSError, msgspec.DecodeError):
            return "a starting `homefire up`"
        return f"process {record.process.pid} at {record.url}"


def read_up_record(home: Home) -> UpRecord | None:
    try:
        return msgspec.json.decode(home.up_file.read_bytes(), type=UpRecord)
    except FileNotFoundError:
        return None
