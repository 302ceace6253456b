"""What a researcher would write without us: padded rows through Hugging Face, and `peft`."""

from __future__ import annotations

import numpy as np
import peft
import torch
import torch.nn.functional as F
from models import Model
from torch import Tensor
from trainer import RANK
from transformers import AutoModelForCausalLM, PreTrainedModel

from homefire.wire.engine import Arrays

_IGNORED = -100
PEFT_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class PaddedLoop:
    """Right-padded rows, full logits, `cross_entropy` with a sum, backward."""

    def __init__(self, model: Model, *, lora: bool = False) -> None:
        loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            model.directory, dtype=torch.float32, attn_implementation="sdpa"
        )
        if lora:
            config = peft.LoraConfig(r=RANK, lora_alpha=32, target_modules=PEFT_MODULES)
            self._module: torch.nn.Module = peft.get_peft_model(loaded, config)
        else:
            self._module = loaded
        self._module.eval()

    def forward_backward(self, batch: Arrays) -> float:
        tokens, targets, mask = _padded(batch)
        output = self._module(input_ids=tokens, attention_mask=mask, use_cache=False)
        logits = output.logits.float().flatten(0, 1)
        loss = F.cross_entropy(logits, targets.flatten(), ignore_index=_IGNORED, reduction="sum")
        self._module.zero_grad(set_to_none=True)
        loss.backward()
        return float(loss.detach())


def _padded(batch: Arrays) -> tuple[Tensor, Tensor, Tensor | None]:
    lengths = batch["lengths"].tolist()
    shape = (len(lengths), max(lengths))
    tokens = torch.zeros(shape, dtype=torch.int64)
    targets = torch.full(shape, _IGNORED)
    edges = np.cumsum(lengths)[:-1]
    parts = zip(
        np.split(batch["tokens"], edges), np.split(batch["target_tokens"], edges), strict=True
    )
    for row, (row_tokens, row_targets) in enumerate(parts):
        tokens[row, : len(row_tokens)] = torch.from_numpy(row_tokens.astype(np.int64))
        targets[row, : len(row_targets)] = torch.from_numpy(row_targets[:, 0])
    if len(set(lengths)) == 1:
        return tokens, targets, None
    mask = torch.arange(shape[1])[None] < torch.tensor(lengths)[:, None]
    return tokens, targets, mask.long()
