"""How large a pass may be on an accelerator, from the memory that is free once the weights are there.

Activations are counted, not measured: 12 hidden states and 4 of the MLP's width per layer and token
(measured on CPU: 24.4 hidden states where the MLP is three wide), in the dtype that is computed with.
"""

from __future__ import annotations

from transformers import PreTrainedConfig

from homefire.wire.specs import ActivationBudget, PassBudget

_SHARE = 0.6
"""Of what the weights and their optimizer leave: a chunk of float32 logits and its derivative, kernels'
workspaces and the allocator's waste want the rest."""
_OPTIMIZER_BYTES = 16
"""Per trained parameter: float32 masters, two moments and a gradient."""
SMALLEST_PASS = 1024
"""Tokens: below it an accelerator waits for launches rather than computes."""
LARGEST_PASS = 65536
"""Tokens: above it an accelerator computes no faster, and its reply comes late."""


def pass_budget(
    config: PreTrainedConfig, *, free_bytes: int, num_parameters: int, number_bytes: int
) -> PassBudget:
    """`free_bytes` beside the compute weights; room for an optimizer of all `num_parameters` is kept,
    whatever will be trained."""
    hidden, widest = int(config.hidden_size), config.intermediate_size or 0
    widest = max(widest) if isinstance(widest, list) else int(widest)
    room = max(0, int(_SHARE * (free_bytes - _OPTIMIZER_BYTES * num_parameters)))
    activations = ActivationBudget(
        max_bytes=room,
        layer_token_bytes=number_bytes * (12 * hidden + 4 * widest),
        input_token_bytes=number_bytes * hidden,
        num_layers=int(config.num_hidden_layers),
    )
    whole = activations.layer_token_bytes * activations.num_layers
    tokens = max(SMALLEST_PASS, min(LARGEST_PASS, room // whole))
    return PassBudget(micro_batch_tokens=tokens, activations=activations)
