"""The weights that are measured: a 33 M model whose optimizer is warm, and a 300 M random stand-in.

What one step changes depends on AdamW's moments, so random weights would say nothing: the model is trained
on the Python sources of this machine, settled at a fine-tuning rate, and stepped once at each rate.
"""

from __future__ import annotations

import re
import sysconfig
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from homefire.checkpoints import RawTensor, Tensors, ensure_tiny

VOCABULARY = 16384
RATES = (1e-6, 1e-5, 1e-4)
_ROWS, _LENGTH = 4, 64
_NUM_FILES = 120
_WARM_RATE = 1e-3
_SETTLED_RATE = 1e-5


@dataclass(frozen=True)
class Trained:
    directory: Path
    """A Hugging Face directory of the weights before the step, in bfloat16."""
    before: dict[str, RawTensor]
    after: dict[float, dict[str, RawTensor]]
    """By rate: one step further from the same optimizer state."""


def train(directory: Path, *, warm_steps: int, settling_steps: int) -> Trained:
    torch.manual_seed(0)
    model = _model()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=_WARM_RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0
    )
    step = _stepper(model, optimizer)
    for number in range(warm_steps):
        step(_WARM_RATE * min(1.0, (number + 1) / 30))
    for _ in range(settling_steps):
        step(_SETTLED_RATE)
    _save(model, directory)
    masters = {name: p.detach().clone() for name, p in model.named_parameters()}
    moments = _copy(optimizer.state_dict())
    before, after = _serving(model), {}
    for rate in RATES:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(masters[name])
        optimizer.load_state_dict(_copy(moments))
        step(rate)
        after[rate] = _serving(model)
    return Trained(directory, before, after)


def stand_in(num_parameters: int) -> dict[str, RawTensor]:
    """Random bfloat16 tensors of a model's proportions, spread as initial weights are."""
    generator = np.random.default_rng(0)
    shape = (1024, 4096)
    tensors = {}
    for number in range(num_parameters // (shape[0] * shape[1])):
        values = generator.standard_normal(shape, dtype=np.float32) * np.float32(0.02)
        bits = (values.view("<u4") >> 16).astype("<u2")
        tensors[f"layer.{number}.weight"] = RawTensor(
            "BF16", shape, bits.reshape(-1).view(np.uint8)
        )
    return tensors


def moved(tensors: Tensors, share: float) -> dict[str, RawTensor]:
    """The same with that share of elements one unit in the last place further, up or down."""
    generator = np.random.default_rng(1)
    changed = {}
    for name, tensor in tensors.items():
        bits = tensor.data.view("<u2").copy()
        places = generator.integers(0, bits.size, round(bits.size * share))
        bits[places] += generator.choice(np.array([1, 0xFFFF], "<u2"), places.size)
        changed[name] = RawTensor(tensor.dtype, tensor.shape, bits.view(np.uint8))
    return changed


def num_bytes(tensors: Tensors) -> int:
    return sum(tensor.data.nbytes for tensor in tensors.values())


def changed_share(old: Tensors, new: Tensors) -> float:
    moved = sum(
        int(np.count_nonzero(old[n].data.view("<u2") != new[n].data.view("<u2"))) for n in old
    )
    return 2 * moved / num_bytes(old)


def _model() -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(
        Qwen3Config(
            hidden_size=512,
            intermediate_size=1536,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=64,
            vocab_size=VOCABULARY,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )
    )


def _stepper(model: Qwen3ForCausalLM, optimizer: torch.optim.Optimizer) -> Callable[[float], None]:
    tokens = _source_tokens()

    def step(rate: float) -> None:
        starts = torch.randint(0, len(tokens) - _LENGTH - 1, (_ROWS,))
        rows = torch.stack([tokens[start : start + _LENGTH + 1] for start in starts])
        logits = model(input_ids=rows[:, :-1]).logits
        torch.nn.functional.cross_entropy(
            logits.reshape(-1, VOCABULARY), rows[:, 1:].reshape(-1)
        ).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()

    return step


def _source_tokens() -> torch.Tensor:
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:_NUM_FILES]
    words = (re.findall(r"\w+|\s+|[^\w\s]", file.read_text(errors="ignore")) for file in files)
    return torch.tensor([zlib.crc32(w.encode()) % VOCABULARY for ws in words for w in ws])


def _save(model: Qwen3ForCausalLM, directory: Path) -> None:
    tiny = ensure_tiny(directory.parent / "tiny")
    state = {name: p.detach().to(torch.bfloat16) for name, p in model.state_dict().items()}
    model.save_pretrained(directory, state_dict=state)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (directory / file).write_bytes((tiny / file).read_bytes())


def _serving(model: Qwen3ForCausalLM) -> dict[str, RawTensor]:
    return {name: _raw(parameter) for name, parameter in model.named_parameters()}


def _raw(parameter: torch.Tensor) -> RawTensor:
    data = parameter.detach().to(torch.bfloat16).view(torch.uint8).numpy().reshape(-1).copy()
    return RawTensor("BF16", tuple(parameter.shape), data)


def _copy(state: dict) -> dict:
    moments = {
        k: {n: v.clone() if torch.is_tensor(v) else v for n, v in s.items()}
        for k, s in state["state"].items()
    }
    return {"state": moments, "param_groups": [dict(group) for group in state["param_groups"]]}
