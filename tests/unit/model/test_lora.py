from __future__ import annotations

import pytest
import torch

from homefire.model.lora import (
    adapter_from_peft,
    applied,
    check_fits,
    head_update,
    new_adapter,
    peft_config,
    peft_tensors,
)
from homefire.model.lora_targets import target_paths
from homefire.model.packed import packed_hidden, target_logprobs
from homefire.wire.engine import LoraInit
from homefire.wire.errors import InvalidArgument, Unsupported

ALL = {"train_attn": True, "train_mlp": True, "train_unembed": True}


@pytest.fixture
def trained(tiny):
    """An adapter whose B is not zero."""
    adapter = new_adapter(tiny, rank=4, alpha=8.0, seed=1)
    generator = torch.Generator().manual_seed(2)
    for layer in adapter.layers.values():
        layer.b.copy_(torch.randn(layer.b.shape, generator=generator) * 0.05)
    return adapter


@torch.no_grad()
def logprobs(model, adapter):
    tokens = torch.arange(24)
    with applied(model, adapter):
        hidden = packed_hidden(model, tokens, [10, 14])
    low_rank = head_update(model, adapter, hidden)
    return target_logprobs(hidden, model.logits_head, tokens.roll(-1), low_rank=low_rank)


@torch.no_grad()
def test_an_unmerged_adapter_equals_the_merged_weights(tiny, trained):
    ours = logprobs(tiny, trained)
    embedding = tiny.module.get_input_embeddings().weight.clone()
    for path, layer in trained.layers.items():
        linear = tiny.module.get_submodule(path)
        merged = linear.weight + trained.scaling * layer.b @ layer.a
        linear.weight = torch.nn.Parameter(merged)  # unties the head
    torch.testing.assert_close(tiny.module.get_input_embeddings().weight, embedding)
    tokens = torch.arange(24)
    hidden = packed_hidden(tiny, tokens, [10, 14])
    merged = target_logprobs(hidden, tiny.logits_head, tokens.roll(-1))
    torch.testing.assert_close(ours, merged, atol=1e-5, rtol=0)


def test_a_nora_adapter_has_columns_of_norm_one_and_kaiming_has_bounded_elements(tiny):
    kaiming, nora = (new_adapter(tiny, rank=4, seed=1, init=init) for init in LoraInit)
    for path, layer in nora.layers.items():
        torch.testing.assert_close(layer.a.norm(dim=0), torch.ones(layer.a.shape[1]))
        other = kaiming.layers[path].a
        assert float(other.abs().max()) <= other.shape[1] ** -0.5
        torch.testing.assert_close(layer.a, other / other.norm(dim=0))


def test_a_fresh_adapter_changes_nothing(tiny):
    with torch.no_grad():
        tokens = torch.arange(24)
        hidden = packed_hidden(tiny, tokens, [10, 14])
        plain = target_logprobs(hidden, tiny.logits_head, tokens.roll(-1))
    torch.testing.assert_close(logprobs(tiny, new_adapter(tiny, rank=4)), plain, atol=0, rtol=0)


def test_the_hooks_go_away_even_after_an_error(tiny, trained):
    before = torch.nn.functional.linear(torch.ones(1, 128), tiny.head_weight)

    def fail_inside():
        with applied(tiny, trained):
            assert not torch.equal(tiny.head(torch.ones(1, 128)), before)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert torch.equal(tiny.head(torch.ones(1, 128)), before)


def test_the_flags_choose_modules(tiny):
    def count(**flags):
        return len(target_paths(tiny, **{**ALL, **flags}))

    assert count() == 4 * 7 + 1
    assert count(train_attn=False) == 4 * 3 + 1
    assert count(train_mlp=False) == 4 * 4 + 1
    assert count(train_unembed=False) == 4 * 7
    with pytest.raises(Unsupported, match="no linear layer"):
        count(train_attn=False, train_mlp=False, train_unembed=False)


def test_routed_experts_have_factors_of_their_own_in_the_form_of_peft(make_model):
    model = make_model(
        "qwen3_moe", head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    )
    hidden = model.config.hidden_size
    adapter = new_adapter(model, rank=2)
    prefix = "base_model.model.model.layers.0.mlp.experts"
    shapes = {name: tuple(tensor.shape) for name, tensor in peft_tensors(adapter).items()}
    assert shapes[f"{prefix}.base_layer.lora_A.weight"] == (4 * 2, hidden)
    assert shapes[f"{prefix}.base_layer.lora_B.weight"] == (2 * 32, 2 * 4)
    assert shapes[f"{prefix}.lora_A.weight"] == (4 * 2, 32)
    assert shapes[f"{prefix}.lora_B.weight"] == (hidden, 2 * 4)
    again = adapter_from_peft(peft_tensors(adapter), {"r": 2, "lora_alpha": 32})
    assert again.experts.keys() == adapter.experts.keys()
    check_fits(model, again)
    config = peft_config(model, adapter, base_model="base")
    assert config["target_parameters"][:2] == [
        f"model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")
    ]
    assert not new_adapter(model, rank=2, train_mlp=False).experts


def test_experts_of_another_number_or_with_one_product_are_refused_by_name(make_model):
    sizes = {"head_dim": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    four, eight = (make_model("qwen3_moe", num_experts=n, **sizes) for n in (4, 8))
    tensors = peft_tensors(new_adapter(four, rank=2))
    config = {"r": 2, "lora_alpha": 32}
    with pytest.raises(InvalidArgument, match=r"layers\.0\.mlp\.experts.*8 experts want \(16"):
        check_fits(eight, adapter_from_peft(tensors, config))
    inner = {
        name: tensor
        for name, tensor in tensors.items()
        if not name.startswith("base_model.model.model.layers.0.mlp.experts.lora_")
    }
    with pytest.raises(Unsupported, match="one of the two products"):
        adapter_from_peft(inner, config)


def test_a_nora_adapter_of_experts_has_columns_of_norm_one_by_expert(make_model):
    model = make_model(
        "qwen3_moe", head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    )
    for block in new_adapter(model, rank=3, init=LoraInit.NORA).experts.values():
        norms = block.up.a.unflatten(0, (4, 3)).norm(dim=1)
        torch.testing.assert_close(norms, torch.ones_like(norms))


def test_models_without_plain_linear_layers_are_refused(make_model):
    model = make_model("gpt2", n_embd=64, n_layer=2, n_head=4)
    with pytest.raises(Unsupported, match="gpt2"):
        new_adapter(model, rank=2, train_unembed=False)


def test_the_seed_decides_the_initial_weights(tiny):
    first, again, other = (peft_tensors(new_adapter(tiny, rank=4, seed=seed)) for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_names_and_shapes_are_those_of_peft(tiny, trained):
    tensors = peft_tensors(trained)
    prefix = "base_model.model.model.layers.0.mlp.up_proj"
    assert tensors[f"{prefix}.lora_A.weight"].shape == (4, 128)
    assert tensors[f"{prefix}.lora_B.weight"].shape == (384, 4)
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    config = peft_config(tiny, trained, base_model="tiny")
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 8.0)
    assert "model.layers.0.mlp.up_proj" in config["target_modules"]


def test_a_peft_directory_round_trips_to_the_same_logprobs(tiny, trained):
    again = adapter_from_peft(peft_tensors(trained), peft_config(tiny, trained, base_model="tiny"))
    check_fits(tiny, again)
    assert torch.equal(logprobs(tiny, again), logprobs(tiny, trained))


def test_an_adapter_of_another_model_does_not_fit(make_model, trained):
    with pytest.raises(InvalidArgument, match="adapter"):
        check_fits(make_model("qwen3", head_dim=16), trained)


def test_half_an_adapter_is_refused(trained):
    tensors = peft_tensors(trained)
    del tensors[next(name for name in tensors if "lora_B" in name)]
    with pytest.raises(InvalidArgument, match="lora_B"):
        adapter_from_peft(tensors, {"r": 4, "lora_alpha": 8.0})
