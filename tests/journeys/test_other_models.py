"""Models that homefire did not make: a repository in the Hugging Face cache, a local directory."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, MistralConfig

from homefire.checkpoints.tiny import ensure_tiny
from journeys.hf_cache import cache_repository
from journeys.loop import BATCH, start_loop

SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 320,
    "max_position_embeddings": 512,
    "eos_token_id": 256,
    "bos_token_id": 256,
}


def make_model(directory: Path, config: LlamaConfig | MistralConfig) -> Path:
    """Random weights of a real architecture, beside tiny's tokenizer."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(directory)
    for file in ensure_tiny(directory.parent / "tiny").glob("*token*.json"):
        (directory / file.name).write_bytes(file.read_bytes())
    return directory


@pytest.fixture(params=["repository", "directory"])
def loop(homefire_up, tmp_path, request):
    if request.param == "repository":
        model = make_model(tmp_path / "llama", LlamaConfig(**SMALL, tie_word_embeddings=False))
        cache_repository(tmp_path / "hf" / "hub", "acme/small-llama", model)
        server = homefire_up(env={"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"})
        return start_loop(server, base_model="acme/small-llama")
    root = tmp_path / "models"
    root.mkdir()
    model = make_model(root / "mistral", MistralConfig(**SMALL, sliding_window=8))
    server = homefire_up(arguments=["--model-root", str(root)])
    return start_loop(server, base_model=str(model))


def test_it_trains_syncs_and_serves_with_equal_numbers(loop):
    """The second model's window is shorter than the rows, so that it must be honoured."""
    before = loop.logprobs()
    for step in range(2):
        loop.train()
        snapshot = loop.syncer.save_and_hotload(f"s{step}")
    trained = loop.logprobs()
    assert trained != before
    for datum, expected in zip(BATCH, trained, strict=True):
        prompt = datum.model_input.to_ints()
        sampling = loop.sampler().sample_with_prompt_tokens(
            prompt, max_tokens=1, echo=True, logprobs=True, expect_identity=snapshot
        )
        (completion,) = asyncio.run(sampling)
        got = completion.inference_logprobs[: len(prompt) - 1]
        assert got == pytest.approx(expected[:-1], abs=1e-4)
