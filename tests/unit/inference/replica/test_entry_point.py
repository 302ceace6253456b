"""The replica as control starts it: a process on a Unix socket."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec

from homefire.http.client import ServiceClient
from homefire.wire.completions import Completion
from homefire.wire.internal import ReplicaStatus, ServiceHealth
from homefire.wire.specs import EngineKind, ReplicaSpec, Upstream


async def test_a_process_serves_without_torch_and_stops_when_it_is_told(
    tmp_path: Path, tiny_directory: Path
) -> None:
    upstream = Upstream(str(tmp_path / "r.sock"), "s3cret")
    spec = ReplicaSpec(
        name="d/0",
        nonce="nonce-1",
        listen=upstream,
        account="local",
        deployment="d",
        replica=0,
        base_model="accounts/local/models/tiny",
        model_dir=str(tiny_directory),
        max_context_length=2048,
        threads=1,
        store_root=str(tmp_path / "store"),
        replica_dir=str(tmp_path / "replica"),
        engine=EngineKind.FAKE,
    )
    (tmp_path / "spec.json").write_bytes(msgspec.json.encode(spec))
    process = subprocess.Popen(
        [sys.executable, "-m", "homefire.inference.replica", str(tmp_path / "spec.json")],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        wait_for_line(process, "Uvicorn running")
        client = ServiceClient(upstream)
        health = await client.get("/internal/health", ServiceHealth)
        status = await client.get("/internal/status", ReplicaStatus)
        while not status.ready:
            status = await client.get(
                "/internal/status", ReplicaStatus, after=status.version, wait_s=20
            )
        body = {"prompt": "hi", "max_tokens": 3, "ignore_eos": True}
        answer = await client.post("/inference/v1/completions", body, Completion)
        maps = Path(f"/proc/{process.pid}/maps")
        loaded = maps.read_text() if maps.exists() else ""
        await client.close()
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=20)
    assert health == ServiceHealth("nonce-1", process.pid, "replica")
    assert isinstance(answer.usage, msgspec.Struct)
    assert answer.usage.completion_tokens == 3
    assert "libtorch" not in loaded
    assert process.returncode == 0


def wait_for_line(process: subprocess.Popen[str], words: str) -> None:
    stderr: Any = process.stderr
    for line in stderr:
        if words in line:
            return
    raise AssertionError(f"the replica ended before it said {words!r}")
