from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from homefire.model.loading import load_model
from homefire.wire.errors import InvalidArgument, ModelUnavailable


def test_tiny_is_what_the_architecture_says(tiny):
    assert tiny.architecture == "qwen3"
    assert tiny.vocab_size == 320
    assert tiny.max_context_length == 2048
    assert not tiny.module.training
    assert tiny.head_path == "lm_head"


def test_weights_are_serving_values_held_in_float32(make_directory):
    model = load_model(make_directory("qwen3", head_dim=16))
    for parameter in model.module.parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, parameter.bfloat16().float())


def test_a_directory_without_a_config_is_unavailable(tmp_path):
    with pytest.raises(ModelUnavailable, match=r"config\.json"):
        load_model(tmp_path)


def test_a_checkpoint_that_lacks_a_tensor_is_unavailable(make_directory):
    directory = make_directory("qwen3", head_dim=16)
    weights = directory / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.norm.weight"]
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(ModelUnavailable, match=r"model\.norm\.weight"):
        load_model(directory)


def test_a_directory_without_weights_is_unavailable(make_directory):
    directory = make_directory("qwen3", head_dim=16)
    (directory / "model.safetensors").unlink()
    with pytest.raises(ModelUnavailable, match="cannot be loaded"):
        load_model(directory)


def test_an_unknown_serving_dtype_names_the_known_ones(tiny_directory):
    with pytest.raises(InvalidArgument, match="bfloat16"):
        load_model(tiny_directory, serving_dtype="int4")
