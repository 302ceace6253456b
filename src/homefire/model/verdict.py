"""Whether our attention hook is exact for a model: refused by name where it is not.

A rule and not a list; it also finds whether rows can be packed. Three looks, cheapest first: the configuration, the module's structure, and what
`probe.py` measures by running the model.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from homefire.model import probe
from homefire.model.attention import ATTENTION
from homefire.model.head import decoder_of
from homefire.model.layout import RowLayout
from homefire.wire.context_limit import ContextLimit
from homefire.wire.context_limit import context_limit as limit_of
from homefire.wire.errors import Unsupported

if TYPE_CHECKING:
    from homefire.model.loading import LoadedModel

_ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention", "attention"}
_STATEFUL_LAYERS = {"linear_attention", "mamba", "mamba2", "conv", "hybrid", "hybrid_sliding"}
"""Carry state between tokens: the probe will show that their rows cannot be packed."""
_WITH_ATTENTION = {"hybrid", "hybrid_sliding"}
"""Of these, the ones that hold attention too."""
_LAYERS_BY_TOKEN = {"moe", "mlp"}
_LEAK_TOLERANCE = 1e-5
"""Nats. Measured 0 for dense models and up to 4e-6 for mixtures of experts, above 2 for hybrids."""
_ERROR_TOLERANCE = 1e-3
"""Nats. Summation order alone gives about 1e-5."""
_LEAK_16_BIT = 0.5
"""Nats, in bfloat16 on an accelerator: 0 for dense models, and where an expert's choice flips as much as
`transformers` differs from itself by. A real leak is above 2. Not measured on an accelerator yet."""
_TYPICAL_16_BIT = 0.1
"""Nats, of the median token: dense models of unit gain differ by 0.09 at most. A dropped window, scale or
soft cap moves most tokens by more."""


def refuse_by_config(config: PreTrainedConfig) -> None:
    layers = set(getattr(config, "layer_types", None) or ())
    if odd := sorted(layers - _ATTENTION_LAYERS - _STATEFUL_LAYERS - _LAYERS_BY_TOKEN):
        raise refusal(config, f"it has layers of type {', '.join(odd)}")
    if layers and not layers & (_ATTENTION_LAYERS | _WITH_ATTENTION):
        raise refusal(config, "it has no attention layers")


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


def in_exact_layout(model: LoadedModel) -> LoadedModel:
    """The model in the layout that keeps its rows apart, packed if that does. Runs it; leaves it as it was.

    Unsupported where neither layout gives what the model's own attention gives for each row alone.
    """
    if model.module.config.get_text_config()._attn_implementation != ATTENTION:
        raise refusal(model.config, "it did not take our attention implementation")
    if _keeps_rows_apart(packed := _measured(model)):
        _refuse_error(model, packed)
        return model
    padded = replace(model, layout=RowLayout.PADDED)
    measured = _measured(padded)
    if not _keeps_rows_apart(measured):
        raise refusal(
            model.config,
            f"its rows see one another, packed (by {packed.leak:.1e} nats) and beside each other (by"
            f" {measured.leak:.1e})",
        )
    _refuse_error(padded, measured)
    return padded


def checked_where_it_computes(model: LoadedModel) -> LoadedModel:
    """A model that float32 on a CPU showed to be exact, again on the device and in the dtype that it is
    going to run in: whether the kernels there do the same.

    16-bit numbers differ by more than a dropped term would in a few tokens, and most where the choice of
    an expert flips; so the median counts.
    """
    measured = _measured(model)
    if not measured.leak <= _LEAK_16_BIT or not measured.typical_error <= _TYPICAL_16_BIT:
        raise refusal(
            model.config,
            f"on {model.device.type} half of the tokens of {model.layout} rows differ by more than"
            f" {measured.typical_error:.1e} nats from its own attention, and a row by"
            f" {measured.leak:.1e} with its neighbours",
        )
    return model


def refuse_inexact_decoding(model: LoadedModel) -> None:
    """Of a model in padded layout: whether the state between its tokens can be joined and split by slot."""
    try:
        error = probe.decoding_error(model)
    except (AttributeError, KeyError, NotImplementedError, TypeError, ValueError) as exc:
        why = f"its state is not in transformers' own cache ({type(exc).__name__}: {exc})"
        raise _unserved(model, why) from exc
    if not error <= _ERROR_TOLERANCE:
        raise _unserved(
            model, f"texts decoded beside each other differ from each alone by {error:.1e} nats"
        )


def _unserved(model: LoadedModel, reason: str) -> Unsupported:
    return Unsupported(
        f"models of type {model.architecture!r} can be trained but not served here: {reason}",
        hint="export the snapshot and serve it with another engine",
    )


def _measured(model: LoadedModel) -> probe.Measured:
    try:
        return probe.measure(model)
    except Unsupported as exc:
        raise refusal(model.config, exc.message) from exc


def _keeps_rows_apart(measured: probe.Measured) -> bool:
    """False for what is not a number."""
    return measured.leak <= _LEAK_TOLERANCE


def _refuse_error(model: LoadedModel, measured: probe.Measured) -> None:
    if not measured.error <= _ERROR_TOLERANCE:
        raise refusal(
            model.config,
            f"{model.layout} rows differ from its own attention by {measured.error:.1e} nats",
        )


def refusal(config: PreTrainedConfig, reason: str) -> Unsupported:
    return Unsupported(
        f"models of type {config.model_type!r} cannot run here yet: {reason}",
        hint="choose a decoder whose layers are softmax attention, full, sliding or chunked, or keep"
        " their state in transformers' own cache, e.g. of the Llama, Qwen3, Gemma or Mistral families",
    )
