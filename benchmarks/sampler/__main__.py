"""How fast the embedded engine samples on this CPU, beside what no engine can avoid and what others need.

    make bench-sampler    prints a table and writes benchmarks/results/sampler.json

One thread, a 33 M model, prompts of 64 tokens, 64 new ones at temperature 1, logprobs for all.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import measures
import msgspec
import torch
import transformers
from contenders import ContinuousBatching, Generate, InProcess, replica_spec
from floor import BareProducts
from http_streams import StreamingReplica
from model import make_model, plain_model

RESULTS = Path(__file__).parent.parent / "results" / "sampler.json"


def measure(directory: Path) -> Iterator[measures.Row]:
    transformers.utils.logging.disable_progress_bar()
    model_directory = make_model(directory / "model")
    spec = replica_spec(model_directory, directory, str(directory / "replica.sock"), "bench")
    plain = plain_model(model_directory)
    products, generate = BareProducts(plain), Generate(plain)
    engine = InProcess(spec)
    for num_rows, bar in ((1, 1.9), (8, 1.7), (64, 1.6)):
        yield from measures.batch(num_rows, bar, products, engine, generate)
    yield measures.one_long_prompt(engine, as_one_request=True)
    yield measures.one_long_prompt(engine, as_one_request=False)
    replica = StreamingReplica(spec, directory)
    try:
        yield measures.http_streaming(replica, engine)
    finally:
        replica.stop()
        engine.close()
    narrow = InProcess(msgspec.structs.replace(spec, max_running=measures.BATCH))
    yield measures.mixed_lengths(narrow, generate)
    yield measures.continuous_batching(ContinuousBatching(plain_model(model_directory)), narrow)
    narrow.close()


def commit() -> str:
    run = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return run.stdout.strip() or "unknown"


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def show(row: measures.Row) -> None:
    sign = "<=" if row.is_lower_better else ">="
    bar = f"{sign} {row.bar:.2f}" if row.bar is not None else ""
    verdict = {None: "", True: "met", False: "MISSED"}[row.is_met]
    print(f"{row.what:<68} {row.value:6.2f}  {bar:<8} {verdict:<7} {row.detail}", flush=True)


def main() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    started = time.perf_counter()
    rows = []
    with tempfile.TemporaryDirectory(prefix="homefire-bench-") as directory:
        for row in measure(Path(directory)):
            show(row)
            rows.append(row)
    record = {
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{processor()}, {os.cpu_count()} cores, one thread used",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "seconds": round(time.perf_counter() - started),
        "rows": [{**asdict(row), "is_met": row.is_met} for row in rows],
    }
    RESULTS.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
