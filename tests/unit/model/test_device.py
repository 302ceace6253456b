"""Where and in which numbers a model computes; bfloat16 runs on a CPU as well, so it is tried there."""

from __future__ import annotations

import pytest
import torch

from homefire.model import attention, verdict
from homefire.model.attention_rule import AttentionRule, Reach
from homefire.model.device import Numbers, device_of, numbers_on
from homefire.model.head import float32_product
from homefire.model.loading import load_model
from homefire.model.packed import packed_hidden, packed_logprobs
from homefire.model.tensors import serving_tensors
from homefire.wire.errors import ModelUnavailable, Unsupported
from homefire.wire.specs import Accelerator


@torch.no_grad()
def logprobs(model):
    tokens = torch.randint(97, (40,), generator=torch.Generator().manual_seed(2))
    hidden = packed_hidden(model, tokens, [17, 23])
    return packed_logprobs(model, hidden, tokens.roll(-1))


def test_a_cpu_computes_in_float32_and_an_accelerator_in_what_snapshots_hold():
    assert numbers_on(torch.device("cpu")) is Numbers.FLOAT32
    assert numbers_on(torch.device("cuda")) is Numbers.SERVING


def test_an_accelerator_that_is_not_there_is_refused_with_the_remedy(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of(Accelerator.CPU) == torch.device("cpu")
    with pytest.raises(ModelUnavailable, match="'cuda'") as refused:
        device_of(Accelerator.CUDA)
    assert "--accelerator cpu" in str(refused.value.hint)


def test_sixteen_bit_weights_are_the_same_values_and_buffers_stay_float32(make_directory):
    directory = make_directory("qwen3", head_dim=16)
    wide = load_model(directory)
    narrow = load_model(directory, numbers=Numbers.SERVING)
    assert {p.dtype for p in narrow.module.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in narrow.module.buffers()} == {torch.float32}
    ours, theirs = serving_tensors(narrow), serving_tensors(wide)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert {p.dtype for p in wide.module.parameters()} == {torch.float32}


def test_logprobs_in_sixteen_bits_are_float32_and_near_those_in_thirty_two(make_directory):
    directory = make_directory("qwen3", head_dim=16)
    exact = logprobs(load_model(directory))
    found = logprobs(load_model(directory, numbers=Numbers.SERVING))
    assert found.dtype == torch.float32
    apart = (found - exact).abs()
    assert apart.median() < 0.05
    assert apart.max() < 0.3
    assert not torch.equal(found, found.bfloat16().float()), "logits were rounded to 16 bits"


def test_a_product_of_sixteen_bit_numbers_is_summed_and_kept_in_thirty_two():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 64, generator=generator).bfloat16() for n in (3, 50))
    bias = torch.randn(50, generator=generator).bfloat16()
    exact = hidden.double() @ weight.double().T + bias.double()
    found = float32_product(hidden, weight, bias)
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() < 1e-5


def test_a_model_whose_kernels_lose_a_window_is_refused_where_it_computes(
    make_directory, monkeypatch
):
    directory = make_directory("mistral", sliding_window=6)
    load_model(directory, numbers=Numbers.SERVING)
    judge = verdict.in_exact_layout

    def judged_then_broken(model):
        found = judge(model)
        monkeypatch.setattr(
            attention,
            "AttentionRule",
            lambda reach, **terms: AttentionRule(Reach(), **terms),
        )
        return found

    monkeypatch.setattr(verdict, "in_exact_layout", judged_then_broken)
    with pytest.raises(Unsupported, match="half of the tokens of packed rows differ"):
        load_model(directory, numbers=Numbers.SERVING)
