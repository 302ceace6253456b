"""The same passes through a running `homefire up`, with the real `tinker` client.

Wall time, since the work is in other processes; in process is timed the same way in the same rounds.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType

import numpy as np
import tinker
from batches import SHAPES, make_batch
from models import Model
from report import Bar, Report, Row
from timing import alternate
from trainer import InProcess

from homefire.foundation.home import Home
from homefire.sdk import TrainerJobConfig, TrainerJobManager
from homefire.sdk.settings import quiet_telemetry, tinker_key
from homefire.wire.engine import Arrays

THROUGH_HTTP = "the same through HTTP, tinker client, wall"
IN_PROCESS = "the same in process, wall"


class Homefire:
    """`homefire up` on a fresh home."""

    def __init__(self, home: Path, model_root: Path) -> None:
        command = [sys.executable, "-m", "homefire.cli.main", "up", "--home", str(home)]
        self._process = subprocess.Popen(
            [*command, "--port", "0", "--model-root", str(model_root)],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert self._process.stdout is not None
        ready = next(line for line in self._process.stdout if line.startswith("homefire is ready"))
        self.url = ready.split()[-1]
        self.key = Home(home).api_key()

    def __enter__(self) -> Homefire:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait()


def measure(report: Report, model: Model, root: Path, *, rounds: int, shapes: list[str]) -> None:
    engine = InProcess(model, root)
    slot = engine.open_full()
    engine.warm_up(slot)
    with Homefire(root / "home", model.directory.parent) as homefire:
        client = _training_client(homefire, model)
        _forward_backward(client, _datums(make_batch([32], model.vocab_size)))
        for shape in shapes:
            batch = make_batch(SHAPES[shape], model.vocab_size)
            data = _datums(batch)
            found = alternate(
                {
                    IN_PROCESS: lambda batch=batch: engine.forward_backward(slot, batch),
                    THROUGH_HTTP: lambda data=data: _forward_backward(client, data),
                },
                rounds=rounds if shape == "8x128" else 1,
            )
            tokens = sum(SHAPES[shape])
            wall = {what: times.wall_s for what, times in found.times.items()}
            report.add(*(Row(model.name, shape, what, s, tokens) for what, s in wall.items()))
            report.add(
                Bar(
                    f"HTTP, share of the rate in process, {model.name} {shape}",
                    wall[IN_PROCESS] / wall[THROUGH_HTTP],
                    at_least=0.95,
                    limited_by="the client's own encoding and its polls share the cores",
                )
            )


def _training_client(homefire: Homefire, model: Model) -> tinker.TrainingClient:
    quiet_telemetry()
    jobs = TrainerJobManager(api_key=homefire.key, base_url=homefire.url)
    name = str(model.directory)
    endpoint = jobs.create_and_wait(TrainerJobConfig(base_model=name))
    service = tinker.ServiceClient(base_url=endpoint.base_url, api_key=tinker_key(homefire.key))
    return service.create_lora_training_client(name, rank=0).result()


def _datums(batch: Arrays) -> list[tinker.Datum]:
    edges = np.cumsum(batch["lengths"])[:-1]
    columns = [np.split(batch[name], edges) for name in ("tokens", "target_tokens", "weights")]
    return [
        tinker.Datum(
            model_input=tinker.ModelInput.from_ints(tokens.tolist()),
            loss_fn_inputs={
                "target_tokens": tinker.TensorData.from_numpy(targets[:, 0]),
                "weights": tinker.TensorData.from_numpy(weights[:, 0]),
            },
        )
        for tokens, targets, weights in zip(*columns, strict=True)
    ]


def _forward_backward(client: tinker.TrainingClient, data: list[tinker.Datum]) -> None:
    client.forward_backward(data, "cross_entropy").result()
