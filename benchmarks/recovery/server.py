"""A `homefire up` of its own, and what the measurements ask it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from homefire.foundation.events import read_events
from homefire.foundation.home import Home
from homefire.sdk import FiretitanServiceClient, TrainerJobConfig, TrainerJobManager

_READY = "homefire is ready at "


class Server:
    """Started on entry, stopped on exit; what it started stops with it."""

    def __init__(self, home: Path, *, engine: str = "torch") -> None:
        self.home = home
        self._engine = engine
        self.url = ""
        self.key = ""

    def __enter__(self) -> Self:
        words = ["up", "--home", str(self.home), "--port", "0", "--engine", self._engine]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "homefire.cli.main", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.startswith(_READY):
            self._process.kill()
            raise RuntimeError(f"homefire did not start: {line!r}")
        self.url, self.key = line.removeprefix(_READY).strip(), Home(self.home).api_key()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    @property
    def jobs(self) -> TrainerJobManager:
        return TrainerJobManager(api_key=self.key, base_url=self.url)

    def create_job(self) -> Job:
        endpoint = self.jobs.create_and_wait(TrainerJobConfig(base_model="tiny", lora_rank=0))
        return Job(self, endpoint.job_id, endpoint.base_url)

    def service_pid(self, name: str) -> int:
        return json.loads((self.home / "run" / f"{name}.json").read_text())["process"]["pid"]

    def status(self) -> dict[str, Any]:
        headers = {"x-api-key": self.key}
        return httpx.get(f"{self.url}/v1/homefire/status", headers=headers, timeout=60).json()


class Job:
    def __init__(self, server: Server, job_id: str, base_url: str) -> None:
        self.server = server
        self.id = job_id
        self.base_url = base_url

    def client(self) -> Any:
        service = FiretitanServiceClient(base_url=self.base_url, api_key=self.server.key)
        return service.create_training_client(base_model="tiny")

    def events(self, name: str) -> list[dict[str, Any]]:
        path = self.server.home / "jobs" / self.id / "events.jsonl"
        return [event for _, event in read_events(path) if event["event"] == name]


def pss_mib(pid: int) -> float:
    """Proportional set size: pages shared with other processes count in part."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"process {pid} has no Pss")
