"""How light homefire is on its feet: start-up, first completion, memory, and what the layers add.

    make bench            prints a table and writes benchmarks/results/lifecycle.json

Times depend on the machine, so each row has a ratio to a floor measured in the same run: the time that
a bare Python needs to import torch and transformers, which no engine can avoid.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from homefire.foundation.home import Home
from homefire.sdk import (
    DeploymentConfig,
    DeploymentManager,
    DeploymentSampler,
    FiretitanServiceClient,
    TrainerJobConfig,
    TrainerJobManager,
)

RESULTS = Path(__file__).parent / "results" / "lifecycle.json"


@dataclass(frozen=True)
class Row:
    what: str
    value: float
    unit: str
    bar: str
    ratio_to_floor: float | None = None


def timed(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def median_time(command: list[str], runs: int = 5) -> float:
    """Seconds, after one run that warms the disk cache."""
    timed(command)
    return statistics.median(timed(command) for _ in range(runs))


def memory_mib(pids: list[int]) -> float:
    """Proportional set size: shared pages are counted once over all processes."""
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1])
    return total / 1024


def descendants(root: int) -> list[int]:
    """All processes whose command line names our packages; engines have sessions of their own."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if b"homefire" in command and int(entry.name) != os.getpid():
                found.append(int(entry.name))
    return sorted({root, *found})


class Server:
    """`homefire up` on a fresh home, stopped at the end."""

    def __init__(self, home: Path) -> None:
        started = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "homefire.cli.main", "up", "--home", str(home), "--port", "0"],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("homefire is ready at "):
                self.url = line.split()[-1]
                break
        self.start_s = time.perf_counter() - started
        self.key = Home(home).api_key()

    def stop(self) -> float:
        started = time.perf_counter()
        self.process.send_signal(signal.SIGTERM)
        self.process.wait()
        return time.perf_counter() - started


def measure(home: Path) -> list[Row]:
    python = sys.executable
    floor = median_time([python, "-c", "import torch, transformers.models.qwen3.modeling_qwen3"], 3)
    bare = median_time([python, "-c", "pass"])
    help_s = median_time([python, "-m", "homefire.cli.main", "--help"])
    server = Server(home)
    rows = [
        Row("floor: import torch and transformers", floor, "s", ""),
        Row("homefire --help", help_s, "s", f"<= {2 * bare + 0.2:.2f} (2 x bare python + 0.2)"),
        Row("homefire up until ready", server.start_s, "s", "<= 3"),
    ]
    try:
        rows += measure_services(server, floor)
    finally:
        rows.append(Row("stop", server.stop(), "s", ""))
    return rows


def measure_services(server: Server, floor: float) -> list[Row]:
    jobs = TrainerJobManager(api_key=server.key, base_url=server.url)
    deployments = DeploymentManager(api_key=server.key, base_url=server.url)
    started = time.perf_counter()
    endpoint = jobs.create_and_wait(TrainerJobConfig(base_model="tiny"))
    trainer_s = time.perf_counter() - started
    started = time.perf_counter()
    deployments.create_or_get(DeploymentConfig(deployment_id="bench", base_model="tiny"))
    deployments.wait_for_ready("bench")
    sampler = DeploymentSampler(
        inference_url=server.url, model="accounts/local/deployments/bench", api_key=server.key
    )
    asyncio.run(sampler.sample_with_prompt_tokens([1, 2], max_tokens=4))
    completion_s = time.perf_counter() - started
    service = FiretitanServiceClient(base_url=endpoint.base_url, api_key=server.key)
    client = service.create_training_client(base_model="tiny")
    memory = memory_mib(descendants(server.process.pid))
    rows = [
        Row("trainer running", trainer_s, "s", "<= 15", trainer_s / floor),
        Row("deployment's first completion", completion_s, "s", "<= 15", completion_s / floor),
        Row("memory of all processes (PSS)", memory, "MiB", "< 2048"),
        Row("512 completions of 6 tokens", burst(sampler), "s", ""),
        Row("optim_step round trip, median of 20", step_ms(client), "ms", ""),
    ]
    return rows


def burst(sampler: DeploymentSampler) -> float:
    prompt = [*b"52714", 257]
    started = time.perf_counter()
    asyncio.run(sampler.sample_with_prompt_tokens(prompt, n=512, max_tokens=6))
    return time.perf_counter() - started


def step_ms(client: object) -> float:
    import tinker

    def once() -> float:
        started = time.perf_counter()
        client.optim_step(tinker.AdamParams(learning_rate=0.0)).result()
        return 1000 * (time.perf_counter() - started)

    return statistics.median(once() for _ in range(20))


def commit() -> str:
    run = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return run.stdout.strip() or "unknown"


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="homefire-bench-") as directory:
        rows = measure(Path(directory) / "home")
    for row in rows:
        ratio = f"{row.ratio_to_floor:5.2f} x floor" if row.ratio_to_floor else ""
        print(f"{row.what:<42} {row.value:9.2f} {row.unit:<4} {row.bar:<38} {ratio}")
    RESULTS.parent.mkdir(exist_ok=True)
    record = {
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "rows": [asdict(row) for row in rows],
    }
    RESULTS.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
