"""What a client notices of a death, and what a recovery takes, on `tiny` through the whole stack."""

from __future__ import annotations

import os
import signal
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import tinker
from report import Bar, Report
from server import Job, Server, pss_mib

from homefire.sdk import DeploymentConfig, DeploymentManager

_ADAM = tinker.AdamParams(learning_rate=1e-4)
_STREAMED_TOKENS = 120
_NUM_STREAMS = 4


def measure(report: Report, root: Path, *, quick: bool) -> None:
    with Server(root / "kills") as server:
        deployments = DeploymentManager(api_key=server.key, base_url=server.url)
        deployments.create_or_get(DeploymentConfig(deployment_id="kept", base_model="tiny"))
        job = server.create_job()
        deployments.wait_for_ready("kept")
        trainee = Trainee(job)
        trainee.train(5)
        _kill_engine(report, job, trainee)
        _kill_control(report, server, trainee, seconds=2.0 if quick else 6.0)
        _recoveries(report, job, trainee, steps=(8, 32) if quick else (8, 32, 128))
        _memory(report, job, server, trainee, steps=40 if quick else 400)


class Trainee:
    """A client that trains, and the seconds that each of its operations took."""

    def __init__(self, job: Job) -> None:
        self._client = job.client()
        self.seconds: list[float] = []

    def train(self, steps: int = 1) -> list[float]:
        """Of these steps alone."""
        before = len(self.seconds)
        for _ in range(steps):
            self._time(lambda: self._client.forward_backward(_BATCH, "cross_entropy"))
            self._time(lambda: self._client.optim_step(_ADAM))
        return self.seconds[before:]

    def _time(self, operation: Callable[[], Any]) -> None:
        started = time.perf_counter()
        operation().result()
        self.seconds.append(time.perf_counter() - started)


@dataclass
class Streams:
    num_whole: int = 0
    cut: list[str] = field(default_factory=list)


def _kill_control(report: Report, server: Server, trainee: Trainee, *, seconds: float) -> None:
    """Streams and operations run over it; the next control adopts what runs."""
    before = trainee.train(20)
    streams, over = Streams(), threading.Event()
    threads = [
        threading.Thread(target=_stream, args=(server, streams, over)) for _ in range(_NUM_STREAMS)
    ]
    for thread in threads:
        thread.start()
    control = server.service_pid("control")
    beside = trainee.train(10)
    os.kill(control, signal.SIGKILL)
    during: list[float] = []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or server.service_pid("control") == control:
        during += trainee.train()
    over.set()
    for thread in threads:
        thread.join()
    report.note(
        operation_alone_ms=1000 * statistics.median(before),
        operation_beside_streams_ms=1000 * statistics.median(beside),
        operation_over_control_kill_ms=1000 * statistics.median(during),
        slowest_beside_streams_ms=1000 * max(beside),
        slowest_over_control_kill_ms=1000 * max(during),
        streams_over_control_kill=streams.num_whole,
    )
    delay_ms = 1000 * (max(during) - max(beside))
    report.add(
        Bar("control killed: streams cut", len(streams.cut), at_most=0),
        Bar("control killed: slowest operation, less before, ms", delay_ms, at_most=250),
    )


def _stream(server: Server, streams: Streams, over: threading.Event) -> None:
    body = {
        "model": "accounts/local/deployments/kept",
        "prompt": [*b"a stream that is not cut"],
        "max_tokens": _STREAMED_TOKENS,
        "stream": True,
    }
    headers = {"x-api-key": server.key}
    with httpx.Client(base_url=server.url, headers=headers, timeout=60) as http:
        while not over.is_set():
            try:
                with http.stream("POST", "/inference/v1/completions", json=body) as response:
                    text = "".join(response.iter_text())
            except httpx.HTTPError as exc:
                streams.cut.append(str(exc))
                continue
            if text.rstrip().endswith("data: [DONE]"):
                streams.num_whole += 1
            else:
                streams.cut.append(text[-200:])


def _kill_engine(report: Report, job: Job, trainee: Trainee) -> None:
    """Early, with a few operations to replay: what longer replays add is measured apart. The start is
    that of the engine which takes over; the first one of all shares the machine with other starts."""
    usual = statistics.median(trainee.train(5))
    os.kill(job.events("engine_started")[-1]["pid"], signal.SIGKILL)
    gap_s = max(trainee.train(3)) - usual
    start_s = job.events("engine_started")[-1]["at"] - job.events("engine_died")[-1]["at"]
    replayed = job.events("recovered")[-1]["replayed"]
    report.note(
        engine_start_s=start_s, gap_of_engine_kill_s=gap_s, operations_replayed_in_gap=replayed
    )
    report.add(
        Bar("engine killed: gap, less engine's start, s", gap_s - start_s, at_most=2),
    )


def _recoveries(report: Report, job: Job, trainee: Trainee, *, steps: tuple[int, ...]) -> None:
    """Each replays what the ones before it did, and more; the engine's start is not in the figure."""
    for count in steps:
        trainee.train(count)
        os.kill(job.events("engine_started")[-1]["pid"], signal.SIGKILL)
        trainee.train(1)
        last = job.events("recovered")[-1]
        replayed, seconds = last["replayed"], last["at"] - job.events("engine_started")[-1]["at"]
        report.note(**{f"replay_of_{replayed}_operations_s": seconds})
        report.note(**{f"replay_of_{replayed}_ms_per_operation": 1000 * seconds / max(1, replayed)})
        if last["divergences"]:
            raise RuntimeError(f"the replay diverged: {last['divergences'][0]}")


def _memory(report: Report, job: Job, server: Server, trainee: Trainee, *, steps: int) -> None:
    pids = {
        "front": job.events("started")[-1]["pid"],
        "control": server.service_pid("control"),
        "gateway": server.service_pid("gateway"),
    }
    trainee.train(steps // 4)
    before = {name: pss_mib(pid) for name, pid in pids.items()}
    trainee.train(steps)
    for name, pid in pids.items():
        grown = pss_mib(pid) - before[name]
        report.note(**{f"{name}_memory_MiB": before[name]})
        report.note(**{f"{name}_growth_MiB_per_1000_operations": grown * 1000 / (2 * steps)})


def _datum(text: bytes) -> tinker.Datum:
    tokens, targets = list(text)[:-1], list(text)[1:]
    shape = [len(targets)]
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints(tokens),
        loss_fn_inputs={
            "target_tokens": tinker.TensorData(data=targets, dtype="int64", shape=shape),
            "weights": tinker.TensorData(data=[1.0] * len(targets), dtype="float32", shape=shape),
        },
    )


_BATCH = [_datum(b"homefire trains what you own, and goes on where it was" * 2)] * 4
