"""Adapters between us and `peft`, in both directions, over architectures with other module paths.

Logits are compared, not names alone: a reader that drops a layer it does not recognise only warns.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from homefire.checkpoints import read_adapter_directory
from homefire.model.experts import ExpertsLowRank, LowRank, block_of, fused_experts
from homefire.model.loading import LoadedModel
from homefire.model.lora import (
    LoraAdapter,
    adapter_from_peft,
    applied,
    check_fits,
    new_adapter,
    peft_config,
    peft_tensors,
)
from homefire.model.lora_targets import target_paths
from homefire.model.tensors import from_raw
from homefire.wire.errors import Unsupported
from parity.random_decoders import (
    DENSE,
    HYBRID,
    ROUTED,
    VOCABULARY,
    as_loaded,
    random_decoder,
)

torch.set_num_threads(1)
TOLERANCE = 1e-6
"""Of the largest logit, both sides in float64 so that the order of products does not show (in float32 it
shows with 1e-6 to 3e-5). Measured 9e-16 at most."""
QUICK = (
    "llama_tied_bias",
    "gemma3n",
    "gpt_neox",
    "opt",
    "qwen3_moe",
    "deepseek_v3",
    "gpt_oss",
    "falcon_h1",
    "lfm2",
)
"""Between them: a tied head, biases, leaf names that match elsewhere, three prefixes, routed
experts (alone, beside dense layers, transposed with biases), and token mixers that are no attention."""
ARCHITECTURES = [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.long)
    for name in (*DENSE, *ROUTED, *HYBRID)
]


@pytest.fixture
def peft():
    """Its warnings that it lacks or ignores a tensor are failures; what it says of tied heads (which
    are meant to be adapted) and of deprecated names is its own affair."""
    module = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*([Mm]issing|[Uu]nexpected).*")
        yield module


def flags(model) -> dict[str, bool]:
    """All that can be adapted: Llama 4's experts cannot."""
    owners = fused_experts(model.module).values()
    train_mlp = all(block_of(owner) is not None for owner in owners)
    return {"train_attn": True, "train_mlp": train_mlp, "train_unembed": True}


def trained_adapter(model, seed: int = 5) -> LoraAdapter:
    """One whose B is not zero, as after training."""
    adapter = new_adapter(model, rank=3, alpha=7.0, seed=seed, **flags(model))
    generator = torch.Generator().manual_seed(seed)
    for layer in adapter.low_ranks().values():
        layer.b.copy_(torch.randn(layer.b.shape, generator=generator) * 0.2)
    return adapter


@torch.no_grad()
def logits(module, adapter: LoraAdapter | None = None) -> torch.Tensor:
    """In float64, of a text longer than the windows of these configurations."""
    module.double()
    tokens = torch.randint(VOCABULARY, (1, 23), generator=torch.Generator().manual_seed(3))
    if adapter is None:
        return module(input_ids=tokens, use_cache=False).logits[0]
    with applied(as_loaded(module), in_float64(adapter)):
        return module(input_ids=tokens, use_cache=False).logits[0]


def in_float64(adapter: LoraAdapter) -> LoraAdapter:
    def double(layer: LowRank) -> LowRank:
        return LowRank(layer.a.double(), layer.b.double())

    layers = {path: double(layer) for path, layer in adapter.layers.items()}
    experts = {
        path: ExpertsLowRank(double(block.up), double(block.down))
        for path, block in adapter.experts.items()
    }
    return LoraAdapter(adapter.rank, adapter.alpha, layers, experts)


def write(model: LoadedModel, adapter: LoraAdapter, directory: Path, **changes: Any) -> Path:
    config = {**peft_config(model, adapter, base_model="base"), **changes}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    tensors = {name: tensor.contiguous() for name, tensor in peft_tensors(adapter).items()}
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


def read_by_peft(peft, name: str, directory: Path) -> torch.Tensor:
    return logits(peft.PeftModel.from_pretrained(random_decoder(name), str(directory)).eval())


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_peft_reads_what_we_write_with_equal_logits(name, tmp_path, peft):
    module = random_decoder(name)
    model = as_loaded(module)
    adapter = trained_adapter(model)
    ours = logits(module, adapter)
    theirs = read_by_peft(peft, name, write(model, adapter, tmp_path))
    assert difference(ours, theirs) <= TOLERANCE
    assert difference(logits(module), theirs) > 0.01


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_we_read_what_peft_writes_with_equal_logits(name, tmp_path, peft):
    module = random_decoder(name)
    model = as_loaded(module)
    like = new_adapter(model, rank=3, alpha=7.0, **flags(model))
    targets = {
        key: value
        for key, value in peft_config(model, like, base_model="base").items()
        if key in ("target_modules", "target_parameters")
    }
    config = peft.LoraConfig(r=3, lora_alpha=7, init_lora_weights=False, **targets)
    with torch.random.fork_rng():
        torch.manual_seed(8)
        wrapped = peft.get_peft_model(random_decoder(name), config).eval()
    wrapped.save_pretrained(str(tmp_path), save_embedding_layers=False)
    found = read_adapter_directory(tmp_path)
    adapter = adapter_from_peft(
        {key: from_raw(tensor) for key, tensor in found.tensors.items()},
        {"r": found.config.r, "lora_alpha": found.config.lora_alpha},
    )
    check_fits(model, adapter)
    assert adapter.parameters().keys() == like.parameters().keys()
    theirs = logits(wrapped)
    assert difference(logits(module, adapter), theirs) <= TOLERANCE
    assert difference(logits(module), theirs) > 0.01


# Mistakes that these comparisons must find ----------------------------------------------------


def test_leaf_names_as_targets_are_found_to_match_other_modules(tmp_path, peft):
    """What a writer does that shortens `model.altup_projections.0` to `0`."""
    model = as_loaded(random_decoder("gemma3n"))
    adapter = trained_adapter(model)
    leaves = sorted({path.rpartition(".")[2] for path in adapter.layers})
    with pytest.raises((Warning, ValueError), match=r"[Mm]issing|not supported"):
        read_by_peft(peft, "gemma3n", write(model, adapter, tmp_path, target_modules=leaves))


def test_a_layer_that_is_left_out_of_the_targets_is_found(tmp_path, peft):
    model = as_loaded(random_decoder("llama_tied_bias"))
    adapter = trained_adapter(model)
    written = write(model, adapter, tmp_path, target_modules=list(adapter.layers)[1:])
    theirs = read_by_peft(peft, "llama_tied_bias", written)
    ours = logits(random_decoder("llama_tied_bias"), adapter)
    assert difference(ours, theirs) > 1000 * TOLERANCE


def test_two_layers_in_each_others_place_are_found(tmp_path, peft):
    module = random_decoder("gpt_neox")
    model = as_loaded(module)
    adapter = trained_adapter(model)
    first, second = [path for path in adapter.layers if path.endswith("query_key_value")][:2]
    swapped = {**adapter.layers, first: adapter.layers[second], second: adapter.layers[first]}
    ours = logits(module, LoraAdapter(adapter.rank, adapter.alpha, swapped))
    theirs = read_by_peft(peft, "gpt_neox", write(model, adapter, tmp_path))
    assert difference(ours, theirs) > 1000 * TOLERANCE


def test_two_experts_in_each_others_place_are_found(tmp_path, peft):
    module = random_decoder("qwen3_moe")
    model = as_loaded(module)
    adapter = trained_adapter(model)
    path, block = next(iter(adapter.experts.items()))
    a_by_expert = block.up.a.unflatten(0, (8, -1))
    swapped = LowRank(a_by_expert.roll(1, 0).flatten(0, 1), block.up.b)
    experts = {**adapter.experts, path: ExpertsLowRank(swapped, block.down)}
    ours = logits(module, LoraAdapter(adapter.rank, adapter.alpha, adapter.layers, experts))
    theirs = read_by_peft(peft, "qwen3_moe", write(model, adapter, tmp_path))
    assert difference(ours, theirs) > 1000 * TOLERANCE


def test_a_b_that_lies_expert_by_expert_is_found(tmp_path, peft):
    """PEFT's B of experts has the expert last."""
    module = random_decoder("gpt_oss")
    model = as_loaded(module)
    adapter = trained_adapter(model)
    experts = {
        path: ExpertsLowRank(
            block.up, LowRank(block.down.a, block.down.b.unflatten(1, (8, -1)).mT.flatten(1))
        )
        for path, block in adapter.experts.items()
    }
    ours = logits(module, LoraAdapter(adapter.rank, adapter.alpha, adapter.layers, experts))
    theirs = read_by_peft(peft, "gpt_oss", write(model, adapter, tmp_path))
    assert difference(ours, theirs) > 1000 * TOLERANCE


def test_dense_layers_beside_experts_that_are_listed_as_modules_are_found(tmp_path, peft):
    """PEFT takes them for the experts, which are then twice as many ranks as the file holds."""
    model = as_loaded(random_decoder("deepseek_v3"))
    adapter = trained_adapter(model)
    written = write(model, adapter, tmp_path, target_modules=list(adapter.layers))
    with pytest.raises((RuntimeWarning, UserWarning, RuntimeError, ValueError)):
        read_by_peft(peft, "deepseek_v3", written)


def test_a_file_that_also_holds_the_base_head_is_refused_with_the_remedy(tmp_path, peft):
    """What peft writes unasked when the head is adapted; the weights need not be this base's."""
    config = peft.LoraConfig(r=3, target_modules=["q_proj", "lm_head"])
    wrapped = peft.get_peft_model(random_decoder("llama"), config)
    wrapped.save_pretrained(str(tmp_path))
    with pytest.raises(Unsupported, match=r"lm_head\.base_layer\.weight") as caught:
        read_adapter_directory(tmp_path)
    assert "save_embedding_layers=False" in str(caught.value.hint)


# Refused by name ------------------------------------------------------------------------------


def test_conv1d_layers_are_refused_by_name_rather_than_left_out():
    model = as_loaded(random_decoder("gpt2"))
    with pytest.raises(Unsupported, match=r"transformer\.h\.0\.attn\.c_attn.*Conv1D"):
        new_adapter(model, rank=2)
    head_only = new_adapter(model, rank=2, train_attn=False, train_mlp=False)
    assert list(head_only.layers) == ["lm_head"]


def test_experts_that_are_called_in_another_way_are_refused_by_name_rather_than_left_out():
    model = as_loaded(random_decoder("llama4"))
    with pytest.raises(Unsupported, match=r"routed experts.*Llama4TextExperts") as caught:
        new_adapter(model, rank=2)
    assert caught.value.field == "train_mlp"
    assert new_adapter(model, rank=2, train_mlp=False).layers


def test_convolutions_are_not_taken_for_experts():
    """Their weights have three dimensions as well."""
    adapter = new_adapter(as_loaded(random_decoder("lfm2")), rank=2)
    assert adapter.layers
    assert not adapter.experts
    assert len(new_adapter(as_loaded(random_decoder("qwen3_next")), rank=2).experts) == 4


@pytest.mark.parametrize("name", ["falcon_h1", "nemotron_h", "bamba", "jamba"])
def test_layers_of_a_mamba_mixer_that_are_never_called_are_not_adapted(name):
    model = as_loaded(random_decoder(name))
    mixers = {
        path
        for path, module in model.module.named_modules()
        if hasattr(module, "A_log") and hasattr(module, "D")
    }
    paths = set(target_paths(model, train_attn=True, train_mlp=False, train_unembed=False))
    assert mixers
    assert {f"{path}.in_proj" for path in mixers} <= paths
    never_called = ("out_proj", "dt_proj")
    assert not {f"{path}.{name}" for path in mixers for name in never_called} & paths
