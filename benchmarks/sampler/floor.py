"""What no engine can avoid: the matrix products of the weights, and nothing around them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel


class BareProducts:
    """Weights fused as far as they can be (qkv, gate and up) and stored by column, which is fastest."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._layers = [_fused(layer) for layer in model.model.layers]
        self._head = _by_column(model.lm_head.weight)

    @torch.inference_mode()
    def decode(self, num_rows: int, num_steps: int) -> None:
        for _ in range(num_steps):
            self._pass(num_rows, num_ends=num_rows)

    @torch.inference_mode()
    def prefill(self, num_tokens: int, num_ends: int) -> None:
        """The head runs on the last token of each prompt."""
        self._pass(num_tokens, num_ends=num_ends)

    def _pass(self, num_rows: int, *, num_ends: int) -> None:
        for weights in self._layers:
            for weight in weights:
                F.linear(_input(num_rows, weight), weight)
        F.linear(_input(num_ends, self._head), self._head)


_inputs: dict[tuple[int, int], Tensor] = {}


def _input(num_rows: int, weight: Tensor) -> Tensor:
    shape = (num_rows, weight.shape[1])
    if shape not in _inputs:
        _inputs[shape] = torch.randn(shape)
    return _inputs[shape]


def _fused(layer: torch.nn.Module) -> list[Tensor]:
    attention, mlp = layer.self_attn, layer.mlp
    qkv = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
    return [
        _by_column(torch.cat(qkv)),
        _by_column(attention.o_proj.weight),
        _by_column(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])),
        _by_column(mlp.down_proj.weight),
    ]


def _by_column(weight: Tensor) -> Tensor:
    return weight.detach().t().contiguous().t()
