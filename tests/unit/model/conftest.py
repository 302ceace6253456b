"""Small random models on disk, with weights strong enough that mistakes show."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from homefire.checkpoints import ensure_tiny
from homefire.model.loading import LoadedModel, load_model

torch.set_num_threads(1)
transformers_logging.disable_progress_bar()

MakeDirectory = Callable[..., Path]
MakeModel = Callable[..., LoadedModel]

_COMMON = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


@torch.no_grad()
def unit_gain(module: torch.nn.Module) -> None:
    """With the usual init of 0.02 a broken mask hides in noise."""
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() >= 2:
            parameter.copy_(noise / math.sqrt(parameter.shape[-1]))
        else:
            parameter.add_(noise * 0.1)


@pytest.fixture
def make_directory(tmp_path: Path) -> MakeDirectory:
    def make(model_type: str, **overrides: Any) -> Path:
        config = AutoConfig.for_model(model_type, **{**_COMMON, **overrides})
        module = AutoModelForCausalLM.from_config(config).eval()
        unit_gain(module)
        directory = tmp_path / model_type
        module.save_pretrained(directory)
        return directory

    return make


@pytest.fixture
def make_model(make_directory: MakeDirectory) -> MakeModel:
    def make(model_type: str = "qwen3", **overrides: Any) -> LoadedModel:
        return load_model(make_directory(model_type, **overrides), serving_dtype="float32")

    return make


@pytest.fixture(scope="session")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def tiny(tiny_directory: Path) -> LoadedModel:
    return load_model(tiny_directory)
