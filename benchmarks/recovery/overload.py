"""More at once than there is room for: large bodies, and samples, with heartbeats beside them.

A published peer needed 26.8 s for 208 bodies of 3.3 MB, with the 95th percentile of its heartbeats at
111 ms; before a fix it lost its connections. Everything here shares the machine: client, gateway, front
and engine. The bodies meet the fake engine, since they are about accepting: it computes on beside it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
from report import Bar, Report
from server import Server

from homefire.sdk import DeploymentConfig, DeploymentManager

_PEER_S = 26.8
_ROWS, _TOKENS = 64, 1024
_SAMPLED_TOKENS = 16


@dataclass
class Heartbeats:
    seconds: list[float] = field(default_factory=list)
    num_failed: int = 0

    def percentile_ms(self, share: float) -> float:
        ordered = sorted(self.seconds)
        return 1000 * ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def bodies(report: Report, root: Path, *, quick: bool) -> None:
    """Accepted means: on disk, in order, with a request id of its own."""
    count = 26 if quick else 208
    with Server(root / "bodies", engine="fake") as server:
        job = server.create_job()
        accepted, elapsed_s, beats, num_bytes = asyncio.run(
            _post_bodies(server, job.base_url, count)
        )
        (row,) = server.status()["jobs"]
        num_known = row["numAccepted"] - 1  # less the model's own creation
        what = f"{count} forward_backward of {num_bytes / 1e6:.1f} MB"
        report.note(
            **{
                f"{what} accepted, s": elapsed_s,
                f"{what}, MB/s": count * num_bytes / 1e6 / elapsed_s,
            }
        )
        report.add(
            Bar(
                f"{what}: s, for {count} (peer {_PEER_S * count / 208:.1f})",
                elapsed_s,
                at_most=_PEER_S * count / 208,
            ),
            Bar(f"{what}: request ids lost", count - len(accepted), at_most=0),
            Bar(f"{what}: accepted and not in the journal", count - num_known, at_most=0),
        )
        _report_heartbeats(report, what, beats)


def samples(report: Report, root: Path, *, quick: bool) -> None:
    count = 200 if quick else 2000
    with Server(root / "samples") as server:
        job = server.create_job()
        deployments = DeploymentManager(api_key=server.key, base_url=server.url)
        deployments.create_or_get(DeploymentConfig(deployment_id="crowd", base_model="tiny"))
        deployments.wait_for_ready("crowd")
        answered, elapsed_s, beats = asyncio.run(_sample(server, job.base_url, count))
        what = f"{count} concurrent samples of {_SAMPLED_TOKENS} tokens"
        report.note(**{f"{what}, s": elapsed_s})
        report.add(Bar(f"{what}: unanswered", count - answered, at_most=0))
        _report_heartbeats(report, what, beats)


def _report_heartbeats(report: Report, what: str, beats: Heartbeats) -> None:
    report.note(**{f"{what}: heartbeats": len(beats.seconds)})
    report.note(**{f"{what}: heartbeat p50, ms": beats.percentile_ms(0.5)})
    report.note(**{f"{what}: heartbeat p95, ms": beats.percentile_ms(0.95)})
    report.add(
        Bar(
            f"{what}: heartbeat p99, ms",
            beats.percentile_ms(0.99),
            at_most=100,
            limited_by="those behind the burst of arrivals, which the gateway's one loop takes in turn",
        ),
        Bar(f"{what}: heartbeats lost", beats.num_failed, at_most=0),
    )


async def _post_bodies(
    server: Server, base_url: str, count: int
) -> tuple[set[str], float, Heartbeats, int]:
    async with _session(server) as http:
        plane = f"{base_url}/api/v1"
        session, model = await _new_model(http, plane)
        data = _data()
        bodies = [_body(model, 1 + seq, data) for seq in range(count)]
        with _beating(server, plane, session) as beats:
            started = time.perf_counter()
            answers = await asyncio.gather(
                *(_post(http, f"{plane}/forward_backward", body) for body in bodies)
            )
            elapsed_s = time.perf_counter() - started
        return {answer["request_id"] for answer in answers}, elapsed_s, beats, len(bodies[0])


async def _sample(server: Server, base_url: str, count: int) -> tuple[int, float, Heartbeats]:
    async with _session(server) as http:
        plane = f"{base_url}/api/v1"
        session, _ = await _new_model(http, plane)
        body = {
            "model": "accounts/local/deployments/crowd",
            "prompt": [*b"a prompt of some tokens"],
            "max_tokens": _SAMPLED_TOKENS,
            "temperature": 1.0,
        }
        url = f"{server.url}/inference/v1/completions"
        with _beating(server, plane, session) as beats:
            started = time.perf_counter()
            answers = await asyncio.gather(*(_post(http, url, body) for _ in range(count)))
            elapsed_s = time.perf_counter() - started
        return sum(bool(answer.get("choices")) for answer in answers), elapsed_s, beats


@contextlib.asynccontextmanager
async def _session(server: Server) -> AsyncIterator[aiohttp.ClientSession]:
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=300)
    headers = {"x-api-key": server.key}
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers) as http:
        yield http


async def _new_model(http: aiohttp.ClientSession, plane: str) -> tuple[str, str]:
    session = (await _post(http, f"{plane}/create_session", {"tags": []}))["session_id"]
    asked = {"session_id": session, "model_seq_id": 0, "base_model": "tiny"}
    created = await _post(http, f"{plane}/create_model", {**asked, "lora_config": {"rank": 0}})
    poll = {"request_id": created["request_id"]}
    return session, (await _post(http, f"{plane}/retrieve_future", poll))["model_id"]


@contextlib.contextmanager
def _beating(server: Server, plane: str, session: str) -> Iterator[Heartbeats]:
    """From a process of its own: a client that is busy sending is late by itself."""
    script = str(Path(__file__).with_name("heartbeats.py"))
    words = [sys.executable, script, f"{plane}/session_heartbeat", server.key, session]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True) as beating:
        assert beating.stdout is not None
        beating.stdout.readline()  # it beats
        beats = Heartbeats()
        try:
            yield beats
        finally:
            told, _ = beating.communicate()
            beats.seconds, beats.num_failed = json.loads(told)


async def _post(http: aiohttp.ClientSession, url: str, body: dict[str, Any] | bytes) -> Any:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json"}
    async with http.post(url, data=data, headers=headers) as response:
        response.raise_for_status()
        return await response.json()


def _data() -> bytes:
    """A batch of reinforcement learning: tokens, old logprobs, advantages. 3.3 MB."""
    draw = random.Random(0)
    rows = [_row(draw) for _ in range(_ROWS)]
    return json.dumps({"data": rows, "loss_fn": "importance_sampling"}).encode()


def _row(draw: random.Random) -> dict[str, Any]:
    tokens = [draw.randrange(256) for _ in range(_TOKENS + 1)]
    logprobs = [-draw.expovariate(1.0) for _ in range(_TOKENS)]
    advantage = draw.gauss(0.0, 1.0)
    shape = [_TOKENS]
    return {
        "model_input": {"chunks": [{"tokens": tokens[:-1], "type": "encoded_text"}]},
        "loss_fn_inputs": {
            "target_tokens": {"data": tokens[1:], "dtype": "int64", "shape": shape},
            "logprobs": {"data": logprobs, "dtype": "float32", "shape": shape},
            "advantages": {"data": [advantage] * _TOKENS, "dtype": "float32", "shape": shape},
        },
    }


def _body(model: str, seq: int, data: bytes) -> bytes:
    named = json.dumps({"model_id": model, "seq_id": seq}).encode()
    return named[:-1] + b', "forward_backward_input": ' + data + b"}"
