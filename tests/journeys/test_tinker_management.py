"""Training runs and their checkpoints in the hands of their owner: the `tinker` command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinker
from safetensors.numpy import load_file

from journeys.loop import row

WAIT_S = 120.0
ADAM = tinker.AdamParams(learning_rate=1e-2)
Tensors = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def server(homefire_up) -> Any:
    return homefire_up()


class Run:
    """A session with one trained model, a state `mark` and a snapshot `mark`."""

    def __init__(self, server: Any, **options: Any) -> None:
        self.service = tinker.ServiceClient(base_url=server.url, api_key=server.api_key, **options)
        self.model = self.service.create_lora_training_client(
            "tiny", rank=4, seed=7, user_metadata={"renderer_name": "role_colon"}
        ).result(WAIT_S)
        for _ in range(2):  # after the first step both factors of the adapter have gradients
            passed = self.model.forward_backward([row(b"homefire trains")], "cross_entropy")
            self.model.optim_step(ADAM).result(WAIT_S)
            passed.result(WAIT_S)
        self.state = self.model.save_state("mark").result(WAIT_S).path
        self.snapshot = self.model.save_weights_for_sampler("mark").result(WAIT_S).path
        self.id = self.model.model_id

    def masters(self, server: Any) -> Tensors:
        """The trained weights as the state in the store holds them."""
        (file,) = (server.home / "store").glob(f"*/*/{self.id}/state/mark/weights.safetensors")
        return load_file(file)


@pytest.fixture
def start_run(server):
    """A factory; every session ends with its test."""
    runs: list[Run] = []

    def start(**options: Any) -> Run:
        runs.append(Run(server, **options))
        return runs[-1]

    yield start
    for run in runs:
        run.service.close("success").result(WAIT_S)


def answer(server: Any, *words: str) -> Any:
    """Of the command line, as JSON."""
    environment = {
        **os.environ,
        "TINKER_BASE_URL": server.url,
        "TINKER_API_KEY": server.api_key,
        "NO_PROXY": "127.0.0.1",
    }
    run = subprocess.run(
        [sys.executable, "-m", "tinker.cli", "--format", "json", *words],
        capture_output=True,
        text=True,
        env=environment,
        timeout=WAIT_S,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return json.loads(run.stdout)


def paths(server: Any, run: Run) -> list[str]:
    rest = tinker.RestClient(base_url=server.url, api_key=server.api_key)
    return [c.tinker_path for c in rest.list_checkpoints(run.id).result(WAIT_S).checkpoints]


def same_bits(found: Tensors, wanted: Tensors) -> bool:
    return found.keys() == wanted.keys() and all(
        found[name].dtype == value.dtype and found[name].tobytes() == value.tobytes()
        for name, value in wanted.items()
    )


def test_a_downloaded_checkpoint_is_the_trained_adapter_bit_for_bit(server, start_run, tmp_path):
    """Exported by a training session of its own, which leaves nothing behind; then deleted."""
    run = start_run()
    masters = run.masters(server)
    assert any(value.any() for name, value in masters.items() if "lora_B" in name)
    told = answer(server, "checkpoint", "download", run.state, "--output", str(tmp_path))
    directory = Path(told["destination"])
    assert same_bits(load_file(directory / "adapter_model.safetensors"), masters)
    config = json.loads((directory / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"]) == ("LORA", 4)
    assert told["file_size_bytes"] == sum(path.stat().st_size for path in directory.iterdir())
    assert answer(server, "checkpoint", "delete", run.state, "--yes")["deleted_count"] == 1
    assert paths(server, run) == [run.snapshot]
    gone = run.service.create_training_client_from_state(run.state)
    with pytest.raises(tinker.TinkerError, match="mark"):
        gone.result(WAIT_S)
    run.model.forward([row(b"still there")], "cross_entropy").result(WAIT_S)


def test_a_copy_in_a_project_trains_on_when_the_original_is_gone(server, start_run):
    run = start_run()
    rest = tinker.RestClient(base_url=server.url, api_key=server.api_key)
    copied = rest.copy_weights(run.state, "archive").result(WAIT_S)
    rest.delete_checkpoint_from_tinker_path(run.state).result(WAIT_S)
    (listed,) = rest.list_training_runs(project_id="archive").result(WAIT_S).training_runs
    assert copied.startswith(f"tinker://{listed.training_run_id}/weights/")
    resumed = run.service.create_training_client_from_state_with_optimizer(copied).result(WAIT_S)
    again = resumed.save_state("again").result(WAIT_S).path
    name = again.removeprefix("tinker://").partition("/")[0]
    (file,) = (server.home / "store").glob(f"*/*/{name}/state/again/weights.safetensors")
    (kept,) = (server.home / "store").glob(f"*/*/{listed.training_run_id}/state/mark")
    assert same_bits(load_file(file), load_file(kept / "weights.safetensors"))


def test_links_and_lists_outlive_a_restart(server, start_run):
    """The key that signs links is the home's."""
    run = start_run()
    external = run.model.save_weights_external("out").result(WAIT_S).path
    rest = tinker.RestClient(base_url=server.url, api_key=server.api_key)
    urls = rest.get_external_weights_urls(external).result(WAIT_S).urls
    before = paths(server, run)
    wanted = {name: fetch(url) for name, url in urls.items()}
    assert wanted.keys() == {"adapter_model.safetensors", "adapter_config.json"}
    old = server.url
    run.service.close("success").result(WAIT_S)
    server.restart()
    assert paths(server, run) == before
    assert {n: fetch(url.replace(old, server.url)) for n, url in urls.items()} == wanted


def fetch(url: str) -> bytes:
    """As the command line does: no key, no headers."""
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url) as response:
        return response.read()
