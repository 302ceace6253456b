"""What the GPU benchmark counts, which needs no GPU."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3Config, Qwen3ForCausalLM

BENCHMARKS = Path(__file__).parents[3] / "benchmarks" / "trainer"


@pytest.fixture
def gpu(monkeypatch):
    """Its neighbours have names that any package could have: they go with it."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module("gpu")
    own = {path.stem for path in BENCHMARKS.glob("*.py")}
    for name in (set(sys.modules) - before) & own:
        del sys.modules[name]


@pytest.mark.parametrize("is_full", [True, False])
def test_the_flops_of_a_pass_are_those_that_torch_counts(gpu, is_full):
    """Of one row; torch counts the half of the scores that causal attention does not need, too, and a
    trained embedding's lookup is none. Frozen weights leave out the first layer's input gradient."""
    config = Qwen3Config(
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=128,
        tie_word_embeddings=True,
    )
    config._attn_implementation = "eager"
    module = Qwen3ForCausalLM(config).requires_grad_(is_full)
    tokens = torch.zeros((1, 50), dtype=torch.int64)
    embedded = module.get_input_embeddings()(tokens).detach().requires_grad_(True)
    with FlopCounterMode(display=False) as counted:
        module(inputs_embeds=embedded, use_cache=False).logits.sum().backward()
    shape = gpu.Shape(sum(p.numel() for p in module.parameters()), 6, 4 * 16)
    found = gpu.pass_flops(shape, [50], is_full=is_full)
    half_of_attention = 12 * 6 * 64 * 50 * 50 / 2
    assert found + half_of_attention == pytest.approx(counted.get_total_flops(), rel=0.02)


def test_rows_attend_to_themselves_alone(gpu):
    shape = gpu.Shape(1000, 2, 64)
    one, two = (gpu.pass_flops(shape, rows, is_full=True) for rows in ([200], [100, 100]))
    assert one - two == 12 * 2 * 64 * (200**2 - 2 * 100**2) / 2
