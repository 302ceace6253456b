"""The measured models, with random weights made on the spot."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from homefire.checkpoints import ensure_tiny


@dataclass(frozen=True)
class Model:
    name: str
    directory: Path
    vocab_size: int
    num_parameters: int
    """A tied head counted once: it is one matrix product, and the embedding is none."""


def make_tiny(root: Path) -> Model:
    return described(ensure_tiny(root / "tiny"))


def make_small(root: Path) -> Model:
    """Qwen3 of 33.6 M parameters."""
    return make_qwen3(
        root / "small",
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        vocab_size=16384,
        max_position_embeddings=2048,
    )


def make_qwen3(directory: Path, **shape: int) -> Model:
    """Written once; the tokenizer is `tiny`'s, which is never asked for more than bytes."""
    if not (directory / "model.safetensors").is_file():
        torch.manual_seed(0)
        config = Qwen3Config(
            tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=0, **shape
        )
        Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
        tiny = ensure_tiny(directory.parent / "tiny")
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (directory / file).write_bytes((tiny / file).read_bytes())
    return described(directory)


def described(directory: Path) -> Model:
    config = json.loads((directory / "config.json").read_text())
    model = Model(directory.name, directory, config["vocab_size"], 0)
    count = sum(parameter.numel() for parameter in empty_module(model).parameters())
    return replace(model, num_parameters=count)


def empty_module(model: Model) -> Qwen3ForCausalLM:
    """Shapes without numbers."""
    config = json.loads((model.directory / "config.json").read_text())
    with torch.device("meta"):
        return Qwen3ForCausalLM(Qwen3Config.from_dict(config))
