"""Whether our attention hook is exact for a model: refused by name where it is not.

A rule and not a list. Three looks, cheapest first: the configuration, the module's structure, and what
`probe.py` measures by running the model.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from homefire.model import probe
from homefire.model.attention import ATTENTION
from homefire.model.head import decoder_of
from homefire.wire.context_limit import ContextLimit
from homefire.wire.context_limit import context_limit as limit_of
from homefire.wire.errors import Unsupported

if TYPE_CHECKING:
    from homefire.model.loading import LoadedModel

_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention", "attention"}
_STATEFUL_LAYERS = {"linear_attention", "mamba", "mamba2", "conv", "hybrid", "hybrid_sliding"}
_LEAK_TOLERANCE = 1e-5
"""Nats. Measured 0 for dense models and up to 4e-6 for mixtures of experts, above 2 for hybrids."""
_ERROR_TOLERANCE = 1e-3
"""Nats. Summation order alone gives about 1e-5."""


def refuse_by_config(config: PreTrainedConfig) -> None:
    layers = set(getattr(config, "layer_types", None) or ())
    if stateful := sorted(layers & _STATEFUL_LAYERS):
        raise refusal(config, f"its {', '.join(stateful)} layers carry state between tokens")
    if odd := sorted(layers - _ATTENTION_LAYERS):
        raise refusal(config, f"it has layers of type {', '.join(odd)}")


def refuse_by_structure(module: PreTrainedModel) -> None:
    config = module.config.get_text_config()
    if not module._can_set_attn_implementation():
        raise refusal(config, "its attention is not taken from transformers' AttentionInterface")
    if type(module.get_output_embeddings()) is not nn.Linear:
        raise refusal(config, "its head is not a linear layer")
    backbone = decoder_of(module)
    if "position_ids" not in inspect.signature(backbone.forward).parameters:
        raise refusal(config, "its base model takes no position_ids")


def context_limit(config: PreTrainedConfig) -> ContextLimit:
    return limit_of(config.to_dict())


def refuse_if_inexact(model: LoadedModel) -> None:
    """Runs the model. Leaves it as it was."""
    if model.module.config.get_text_config()._attn_implementation != ATTENTION:
        raise refusal(model.config, "it did not take our attention implementation")
    try:
        measured = probe.measure(model)
    except Unsupported as exc:
        raise refusal(model.config, exc.message) from exc
    if not measured.leak <= _LEAK_TOLERANCE:
        raise refusal(
            model.config,
            f"packed rows see one another (by {measured.leak:.1e} nats), so it keeps state between"
            " tokens outside attention",
        )
    if not measured.error <= _ERROR_TOLERANCE:
        raise refusal(
            model.config,
            f"packed rows differ from its own attention by {measured.error:.1e} nats",
        )


def refusal(config: PreTrainedConfig, reason: str) -> Unsupported:
    return Unsupported(
        f"models of type {config.model_type!r} cannot run here yet: {reason}",
        hint="choose a decoder whose layers are softmax attention, full, sliding or chunked, e.g. of"
        " the Llama, Qwen3, Gemma or Mistral families",
    )
