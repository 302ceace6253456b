"""The built-in model `tiny`: a real Qwen3 of 0.83 M parameters, made on first use, no download.

Its tokens are the 256 bytes and 64 specials. The weights come from integer arithmetic on a fixed
generator, so that they are the same bits on every machine and with every numpy.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from homefire.checkpoints.dtypes import round_to_bf16
from homefire.checkpoints.safetensors_file import write_safetensors
from homefire.checkpoints.staging import remove_leftovers, staging_directory
from homefire.foundation.durable import publish_directory
from homefire.wire.tensors import RawTensor

TINY_NAME = "tiny"
NUM_LAYERS = 4
HIDDEN = 128
NUM_HEADS = 4
NUM_KV_HEADS = 2
HEAD_DIM = 32
MLP = 384
CONTEXT = 2048
END_OF_TEXT = "<|endoftext|>"
ANSWER = "<|answer|>"
NUM_SPECIALS = 64
VOCABULARY = 256 + NUM_SPECIALS

_SEED = 20_260_101
_STD = 0.02
_NUM_UNIFORMS = 12
"""A sum of 12 uniforms has variance 1 and is a normal for all that an initialisation needs."""

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- message['content'] -}}"
    "{%- if message['role'] == 'assistant' -%}{{- '" + END_OF_TEXT + "' -}}"
    "{%- elif message['role'] == 'user' -%}{{- '" + ANSWER + "' -}}"
    "{%- else -%}{{- '\\n' -}}{%- endif -%}"
    "{%- endfor -%}"
)
"""A user message asks for an answer, an assistant message is one and ends, others take a line."""


def ensure_tiny(directory: Path) -> Path:
    """`directory` itself, which holds the model afterwards. Makers may race; all see a whole model."""
    if not (directory / "config.json").is_file():
        remove_leftovers(directory.parent)
        with staging_directory(directory.parent) as staged:
            _write(staged)
            _publish_unless_made(staged, directory)
    return directory


def special_tokens() -> list[str]:
    """Ids 256 to 319, in order."""
    reserved = [f"<|reserved_{i}|>" for i in range(NUM_SPECIALS - 2)]
    return [END_OF_TEXT, ANSWER, *reserved]


def tiny_tensors() -> dict[str, RawTensor]:
    """All parameters in bfloat16 and Hugging Face names; the output layer is tied to the embedding."""
    generator = np.random.PCG64(_SEED)
    return {
        name: _ones(shape) if len(shape) == 1 else _normal(generator, shape)
        for name, shape in _shapes()
    }


def _publish_unless_made(staged: Path, directory: Path) -> None:
    try:
        publish_directory(staged, directory)
    except OSError:
        if not (directory / "config.json").is_file():
            raise


def _write(directory: Path) -> None:
    write_safetensors(directory / "model.safetensors", tiny_tensors(), {"format": "pt"})
    for name, content in (
        ("config.json", _config()),
        ("generation_config.json", _generation_config()),
        ("tokenizer.json", _tokenizer()),
        ("tokenizer_config.json", _tokenizer_config()),
    ):
        encoded = msgspec.json.format(msgspec.json.encode(content), indent=2)
        (directory / name).write_bytes(encoded + b"\n")


def _shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    for layer in range(NUM_LAYERS):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (HIDDEN,)
        yield f"{prefix}.self_attn.q_proj.weight", (NUM_HEADS * HEAD_DIM, HIDDEN)
        yield f"{prefix}.self_attn.k_proj.weight", (NUM_KV_HEADS * HEAD_DIM, HIDDEN)
        yield f"{prefix}.self_attn.v_proj.weight", (NUM_KV_HEADS * HEAD_DIM, HIDDEN)
        yield f"{prefix}.self_attn.o_proj.weight", (HIDDEN, NUM_HEADS * HEAD_DIM)
        yield f"{prefix}.self_attn.q_norm.weight", (HEAD_DIM,)
        yield f"{prefix}.self_attn.k_norm.weight", (HEAD_DIM,)
        yield f"{prefix}.post_attention_layernorm.weight", (HIDDEN,)
        yield f"{prefix}.mlp.gate_proj.weight", (MLP, HIDDEN)
        yield f"{prefix}.mlp.up_proj.weight", (MLP, HIDDEN)
        yield f"{prefix}.mlp.down_proj.weight", (HIDDEN, MLP)
    yield "model.norm.weight", (HIDDEN,)


def _ones(shape: tuple[int, ...]) -> RawTensor:
    return round_to_bf16(np.ones(shape, np.float32))


def _normal(generator: np.random.PCG64, shape: tuple[int, ...]) -> RawTensor:
    """Normal with standard deviation 0.02: sums of 12 uniform 16-bit integers, exact up to the last
    multiplication. `Generator.normal` may change between versions of numpy and of the C library."""
    count = math.prod(shape)
    words = generator.random_raw(count * _NUM_UNIFORMS // 4).astype("<u8")
    sums = words.view("<u2").reshape(count, _NUM_UNIFORMS).sum(axis=1, dtype=np.int64)
    centered: npt.NDArray[np.float64] = (2 * sums - _NUM_UNIFORMS * 65535) / 131072
    return round_to_bf16((centered * _STD).astype(np.float32).reshape(shape))


def _config() -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "dtype": "bfloat16",
        "eos_token_id": 256,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "initializer_range": _STD,
        "intermediate_size": MLP,
        "layer_types": ["full_attention"] * NUM_LAYERS,
        "max_position_embeddings": CONTEXT,
        "max_window_layers": NUM_LAYERS,
        "model_type": "qwen3",
        "num_attention_heads": NUM_HEADS,
        "num_hidden_layers": NUM_LAYERS,
        "num_key_value_heads": NUM_KV_HEADS,
        "pad_token_id": 256,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": VOCABULARY,
    }


def _generation_config() -> dict[str, Any]:
    return {"eos_token_id": 256, "pad_token_id": 256}


def _tokenizer() -> dict[str, Any]:
    """`tokenizer.json`: byte-level BPE without merges, so that token ids 0 to 255 are the bytes."""
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(256 + i, text) for i, text in enumerate(special_tokens())],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {character: byte for byte, character in enumerate(_byte_characters())},
            "merges": [],
        },
    }


def _added_token(token_id: int, content: str) -> dict[str, Any]:
    return {
        "id": token_id,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }


def _byte_characters() -> list[str]:
    """GPT-2's printable stand-in for each byte, which the ByteLevel steps use: the byte's own
    Latin-1 character where that prints, else the next one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    substitutes = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(substitutes)) for byte in range(256)]


def _tokenizer_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": CONTEXT,
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
