"""The fake engines' model: a bigram table, `logits = weight[token]`. Numpy only.

A fake trainer and a fake sampler meet in these names and roundings, as the real ones meet in a
transformers model. Snapshots hold `TENSOR` in bfloat16, as an ordinary model directory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from homefire.wire.errors import InvalidArgument, ModelUnavailable
from homefire.wire.tensors import RawTensor

Float32 = npt.NDArray[np.float32]

TENSOR = "bigram.weight"
"""float32 [V, V] in memory: row = current token, column = next token."""
LAYER = "bigram"
"""The module path that an adapter of it names."""
LORA_A = f"base_model.model.{LAYER}.lora_A.weight"
"""float32 [r, V]"""
LORA_B = f"base_model.model.{LAYER}.lora_B.weight"
"""float32 [V, r]; logits = base[token] + alpha / rank * B @ A[:, token]"""
ARCHITECTURE = "homefire_bigram"
DEFAULT_VOCAB_SIZE = 320
_SEED = 20_240_601


def vocab_size_of(model_dir: Path) -> int:
    """`vocab_size` of the directory's config.json, whatever the architecture; 320 without one."""
    try:
        config = msgspec.json.decode((model_dir / "config.json").read_bytes(), type=dict[str, Any])
    except FileNotFoundError:
        return DEFAULT_VOCAB_SIZE
    except msgspec.DecodeError as exc:
        raise ModelUnavailable(f"{model_dir}/config.json is damaged: {exc}") from exc
    return int(config.get("vocab_size", DEFAULT_VOCAB_SIZE))


def base_weight(vocab_size: int) -> Float32:
    """What every fake starts from: small, fixed by the vocabulary's size, already in bfloat16 values."""
    generator = np.random.Generator(np.random.PCG64(_SEED))
    noise = generator.standard_normal((vocab_size, vocab_size), dtype=np.float32) * np.float32(0.02)
    return bfloat16(noise)


def bfloat16(values: Float32) -> Float32:
    """Round to nearest even, as torch does; the result still float32."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return np.where(np.isnan(values), np.float32(np.nan), rounded.view(np.float32))


def to_raw(weight: Float32) -> RawTensor:
    """The serving tensor: the upper halves of bfloat16-rounded float32 values."""
    halves = (bfloat16(weight).view(np.uint32) >> 16).astype("<u2")
    return RawTensor("BF16", weight.shape, halves.reshape(-1).view(np.uint8))


def from_raw(tensor: RawTensor) -> Float32:
    """A fresh float32 [V, V] from a BF16 or F32 tensor."""
    data = np.ascontiguousarray(tensor.data)
    if tensor.dtype == "F32":
        return np.frombuffer(data.tobytes(), "<f4").reshape(tensor.shape).copy()
    if tensor.dtype != "BF16":
        raise InvalidArgument(f"{TENSOR} is {tensor.dtype}", hint="it must be BF16 or F32")
    halves = np.frombuffer(data.tobytes(), "<u2").astype(np.uint32)
    return (halves << 16).view(np.float32).reshape(tensor.shape)
