"""Reading a model by parts: the same values as loading it whole, and none of it twice in memory."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from homefire.model.loading import load_model
from homefire.model.packed import packed_hidden
from homefire.model.partial_loading import model_without_weights, read_parts, verified
from homefire.model.tensors import live_tensors
from homefire.wire.errors import ModelUnavailable


def halves(tensor):
    """Rows of two processes; the second has fewer where they do not divide."""
    middle = -(-len(tensor) // 2)
    return [slice(0, middle), slice(middle, len(tensor))]


@pytest.mark.parametrize(
    ("family", "options"), [("qwen3", {"head_dim": 16}), ("gemma2", {"head_dim": 16}), ("phi", {})]
)
def test_the_parts_of_a_model_are_the_whole_that_is_loaded(make_directory, family, options):
    directory = make_directory(family, **options)
    whole = load_model(directory)
    empty = model_without_weights(directory, serving_dtype="bfloat16")
    assert empty is not None
    assert all(parameter.is_meta for parameter in empty.module.parameters())
    parts = [
        [part for _, part in read_parts(empty, directory, lambda leaf, r=rank: halves(leaf)[r])]
        for rank in range(2)
    ]
    for (name, live), *both in zip(live_tensors(whole), *parts, strict=True):
        joined = torch.cat(both) if isinstance(live, torch.nn.Parameter) else both[0]
        assert torch.equal(joined.float(), live.float()), name


def test_a_model_that_got_its_weights_later_is_the_one_that_is_loaded(make_directory):
    directory = make_directory("gemma2", head_dim=16)
    whole = load_model(directory)
    empty = model_without_weights(directory, serving_dtype="bfloat16")
    empty.module._apply(lambda t: torch.empty_like(t, device="cpu") if t.is_meta else t)
    with torch.no_grad():
        for leaf, part in read_parts(empty, directory, lambda leaf: slice(0, len(leaf))):
            leaf.copy_(part)
    model = verified(empty)
    assert (model.logits_form, model.layout) == (whole.logits_form, whole.layout)
    with torch.no_grad():
        hidden = [packed_hidden(m, torch.arange(9), [5, 4]) for m in (model, whole)]
    assert torch.equal(*hidden)


@pytest.mark.parametrize("spoil", ["rename", "shape"])
def test_files_that_have_to_be_converted_are_left_to_transformers(make_directory, spoil):
    directory = make_directory("qwen3", head_dim=16)
    path = directory / "model.safetensors"
    tensors = load_file(path)
    norm = tensors.pop("model.norm.weight")
    name = "another.norm.weight" if spoil == "rename" else "model.norm.weight"
    tensors[name] = torch.cat([norm, norm]) if spoil == "shape" else norm
    save_file(tensors, path, {"format": "pt"})
    assert model_without_weights(directory, serving_dtype="bfloat16") is None


def test_a_directory_without_a_config_is_unavailable(tmp_path):
    with pytest.raises(ModelUnavailable, match=r"config\.json"):
        model_without_weights(tmp_path, serving_dtype="bfloat16")


@pytest.mark.parametrize("spoil", ["missing", "cut off"])
def test_broken_files_are_left_to_the_loading_that_names_what_is_wrong(make_directory, spoil):
    directory = make_directory("qwen3", head_dim=16)
    path = directory / "model.safetensors"
    if spoil == "missing":
        index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-100])
    assert model_without_weights(directory, serving_dtype="bfloat16") is None
