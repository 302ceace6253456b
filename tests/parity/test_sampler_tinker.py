"""A sampler's answers to `asample`, with the torch engine, against plain transformers forwards.

The adapter and the full snapshot are read from a store as a trainer writes them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from homefire.checkpoints import (
    CheckpointFamily,
    CheckpointKey,
    DirectoryStore,
    LoraManifest,
    SnapshotInfo,
    ensure_tiny,
    write_base,
    write_lora,
)
from homefire.foundation.clock import SystemClock
from homefire.inference.engine.opening import open_engine
from homefire.inference.replica.app import replica_app
from homefire.inference.replica.replica import Replica
from homefire.model import lora
from homefire.model.loading import load_model
from homefire.model.tensors import raw, serving_tensors
from homefire.wire.specs import EngineKind, ReplicaSpec, Upstream
from parity.sampler_models import merged, reference
from unit.inference.caller import SECRET, Caller
from unit.inference.tinker_caller import SAMPLER, sampled, session

TOLERANCE = 1e-4
RUN = "ts-1:train:0"
PROMPT = [72, 101, 108, 108, 111, 32, 119]
Forward = Callable[[list[int]], Tensor]
INFO = SnapshotInfo(step=1, base_model="tiny", created_at=1.0, metadata={}, expires_at=None)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def saved(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Forward]]:
    """A store with an adapter and a full snapshot of a run, and the forward of each, and of the base."""
    store = DirectoryStore(tmp_path_factory.mktemp("store"))
    generator = torch.Generator().manual_seed(3)
    adapter = lora.new_adapter(load_model(tiny), rank=4, alpha=8.0, seed=1)
    for layer in adapter.layers.values():
        layer.b.normal_(std=0.1, generator=generator)
    write_lora(
        store,
        key("lora"),
        {name: raw(tensor) for name, tensor in lora.peft_tensors(adapter).items()},
        INFO,
        adapter_config=lora.peft_config(load_model(tiny), adapter, base_model="tiny"),
        lora=LoraManifest(4, 8.0),
    )
    full = {
        name: (tensor.float() + 0.02 * torch.randn(tensor.shape, generator=generator)).to(
            tensor.dtype
        )
        for name, tensor in serving_tensors(load_model(tiny)).items()
    }
    tensors = {name: raw(tensor) for name, tensor in full.items()}
    write_base(store, key("full"), tensors, INFO, model_files=tiny)
    forwards = {
        "": reference(tiny),
        "lora": merged(tiny, adapter),
        "full": reference(store.directory(key("full"))),
    }
    return store.root, forwards


def key(name: str) -> CheckpointKey:
    return CheckpointKey("local", "job-1", RUN, CheckpointFamily.SAMPLER, name)


@pytest.fixture
async def caller(
    tiny: Path, saved: tuple[Path, dict[str, Forward]], tmp_path: Path
) -> AsyncIterator[Caller]:
    spec = ReplicaSpec(
        name="d/0",
        nonce="n",
        listen=Upstream("unused", SECRET),
        account="local",
        replica=0,
        base_model="accounts/local/models/tiny",
        model_dir=str(tiny),
        max_context_length=256,
        threads=1,
        store_root=str(saved[0]),
        replica_dir=str(tmp_path),
        engine=EngineKind.TORCH,
        **SAMPLER,
    )
    replica = Replica(spec, open_engine, SystemClock())
    calls = Caller(replica_app(replica))
    replica.start()
    await calls.wait(lambda status: status.ready)
    yield calls
    await replica.stop()


def of(name: str) -> str:
    return session(run=RUN, name=name) if name else session()


def logprobs_of(forward: Forward, text: list[int], start: int) -> list[float]:
    table = forward(text)
    return [table[i - 1, text[i]].item() for i in range(start, len(text))]


@pytest.mark.parametrize("name", ["", "lora", "full"])
async def test_greedy_samples_are_transformers_greedy(
    caller: Caller, saved: tuple[Path, dict[str, Forward]], name: str
) -> None:
    params = {"temperature": 0, "max_tokens": 12, "stop": []}
    result = await sampled(caller, PROMPT, sampling_session_id=of(name), params=params)
    text = list(PROMPT)
    for _ in range(12):
        text.append(int(saved[1][name](text)[-1].argmax()))
    assert result["sequences"][0]["tokens"] == text[len(PROMPT) :]


@pytest.mark.parametrize("name", ["", "lora", "full"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
async def test_logprobs_are_the_model_s_own_at_any_temperature(
    caller: Caller, saved: tuple[Path, dict[str, Forward]], name: str, temperature: float
) -> None:
    """So that the importance ratio of an on-policy sample is 1, and compute_logprobs agrees."""
    params = {"temperature": temperature, "top_p": 0.9, "max_tokens": 20, "stop": [], "seed": 1}
    result = await sampled(
        caller, PROMPT, sampling_session_id=of(name), params=params, num_samples=3
    )
    for sequence in result["sequences"]:
        text = [*PROMPT, *sequence["tokens"]]
        expected = logprobs_of(saved[1][name], text, len(PROMPT))
        assert sequence["logprobs"] == pytest.approx(expected, abs=TOLERANCE)
        scored = await sampled(
            caller,
            text,
            sampling_session_id=of(name),
            prompt_logprobs=True,
            params={"max_tokens": 1},
        )
        assert scored["prompt_logprobs"][len(PROMPT) :] == pytest.approx(
            sequence["logprobs"], abs=TOLERANCE
        )


@pytest.mark.parametrize("name", ["", "lora", "full"])
async def test_prompt_logprobs_are_those_of_a_forward(
    caller: Caller, saved: tuple[Path, dict[str, Forward]], name: str
) -> None:
    result = await sampled(
        caller,
        PROMPT,
        sampling_session_id=of(name),
        prompt_logprobs=True,
        topk_prompt_logprobs=4,
        params={"max_tokens": 1},
    )
    expected = logprobs_of(saved[1][name], PROMPT, 1)
    assert result["prompt_logprobs"][0] is None
    assert result["prompt_logprobs"][1:] == pytest.approx(expected, abs=TOLERANCE)
    values, tokens = saved[1][name](PROMPT)[:-1].topk(4)
    for row, own_tokens, own in zip(
        result["topk_prompt_logprobs"][1:], tokens.tolist(), values.tolist(), strict=True
    ):
        assert [token for token, _ in row] == own_tokens
        assert [logprob for _, logprob in row] == pytest.approx(own, abs=TOLERANCE)


async def test_the_three_are_far_apart(saved: tuple[Path, dict[str, Any]]) -> None:
    """Else the tests above could not tell them from one another."""
    tables = [forward(PROMPT) for forward in saved[1].values()]
    for i, one in enumerate(tables):
        for other in tables[:i]:
            assert (one - other).abs().max() > 0.1
