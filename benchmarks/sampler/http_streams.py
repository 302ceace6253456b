"""The same engine behind HTTP: a replica in a process of its own, and streams read from this one."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
from contenders import Arrival

from homefire.wire.specs import ReplicaSpec


class StreamingReplica:
    """Speaks HTTP/1.1 by hand: a client library would cost more than what is measured."""

    def __init__(self, spec: ReplicaSpec, directory: Path) -> None:
        self._spec = spec
        path = directory / "replica.json"
        path.write_bytes(msgspec.json.encode(spec))
        Path(spec.replica_dir).mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "homefire.inference.replica", str(path)]
        self._process = subprocess.Popen(command, stderr=subprocess.DEVNULL)

    async def wait(self) -> None:
        """Until the engine is open."""
        while True:
            await asyncio.sleep(0.2)
            try:
                if json.loads(await self._call("GET", "/internal/status"))["ready"]:
                    return
            except (FileNotFoundError, ConnectionRefusedError):
                continue

    async def run(self, workload: Sequence[Arrival]) -> int:
        """Tokens that came back."""
        return sum(await asyncio.gather(*(self._stream(item) for item in workload)))

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait()

    async def _stream(self, item: Arrival) -> int:
        body = {
            "model": "accounts/local/deployments/bench",
            "prompt": item.prompt,
            "max_tokens": item.max_new_tokens,
            "stream": True,
            "logprobs": True,
            "raw_output": True,
            "perf_metrics_in_response": True,
        }
        answer = await self._call("POST", "/inference/v1/completions", json.dumps(body).encode())
        if not answer.rstrip().endswith(b"data: [DONE]"):
            raise RuntimeError(f"the stream broke off: {answer[-300:]!r}")
        events = [line for line in answer.split(b"\n\n") if line.startswith(b"data: {")]
        return json.loads(events[-1].removeprefix(b"data: "))["usage"]["completion_tokens"]

    async def _call(self, method: str, path: str, body: bytes = b"") -> bytes:
        reader, writer = await asyncio.open_unix_connection(self._spec.listen.socket)
        head = (
            f"{method} {path} HTTP/1.1\r\nhost: replica\r\nconnection: close\r\n"
            f"x-homefire-secret: {self._spec.listen.secret}\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        answer = await reader.read()
        writer.close()
        head_bytes, _, content = answer.partition(b"\r\n\r\n")
        if b"transfer-encoding: chunked" in head_bytes.lower():
            content = _without_chunk_sizes(content)
        return content


def _without_chunk_sizes(content: bytes) -> bytes:
    pieces, at = [], 0
    while size := int(content[at : (end := content.index(b"\r\n", at))], 16):
        pieces.append(content[end + 2 : end + 2 + size])
        at = end + 2 + size + 2
    return b"".join(pieces)
