"""Whether our attention hook and head are exact for a model: refused by name where they are not.

Three looks, cheapest first: the configuration, the module's structure, and a probe that packs rows
and compares them with the model's own attention, row by row.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from homefire.model.attention import ATTENTION
from homefire.model.packed import packed_hidden, packed_logprobs
from homefire.wire.errors import Unsupported

if TYPE_CHECKING:
    from homefire.model.loading import LoadedModel

_EXACT_LAYERS = {"full_attention", "sliding_attention"}
_HEAD_TRANSFORMS = {
    "final_logit_softcapping": None,
    "logits_scaling": 1.0,
    "logit_scale": 1.0,
    "lm_head_multiplier": 1.0,
}
"""Fields that transform logits behind the head, with their neutral value."""

_DEFAULT_CONTEXT = 2048
_PROBE_LENGTHS = (9, 14, 5)
_LEAK_TOLERANCE = 1e-5
"""Nats. Measured 0 for dense models and up to 4e-6 for mixtures of experts."""
_PROBE_TOLERANCE = 1e-3
"""Nats. Summation order alone gives about 1e-5."""


def refuse_by_config(config: PreTrainedConfig) -> None:
    odd = sorted(set(getattr(config, "layer_types", None) or ()) - _EXACT_LAYERS)
    if odd:
        raise _refusal(config, f"it has layers of type {', '.join(odd)}")
    if getattr(config, "attn_logit_softcapping", None):
        raise _refusal(config, "its attention scores are soft-capped (attn_logit_softcapping)")
    for field, neutral in _HEAD_TRANSFORMS.items():
        value = getattr(config, field, None)
        if value is not None and value != neutral:
            raise _refusal(config, f"its logits are transformed behind the head ({field} {value})")


def refuse_by_structure(module: PreTrainedModel) -> None:
    config = module.config.get_text_config()
    if not module._can_set_attn_implementation():
        raise _refusal(config, "its attention is not taken from transformers' AttentionInterface")
    if getattr(module, "_is_stateful", False):
        raise _refusal(config, "it carries recurrent state between tokens")
    head = module.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise _refusal(config, "its head is not a linear layer")
    if head.bias is not None:
        raise _refusal(config, "its head has a bias")
    backbone = cast(nn.Module, module.get_decoder())
    if "position_ids" not in inspect.signature(backbone.forward).parameters:
        raise _refusal(config, "its base model takes no position_ids")


def context_limit(config: PreTrainedConfig) -> int:
    """Tokens up to which a row's numbers do not depend on the other rows of its batch.

    longrope and dynamic rope switch their frequencies by the longest text in the batch, past the
    length of pre-training.
    """
    limit = int(getattr(config, "max_position_embeddings", None) or _DEFAULT_CONTEXT)
    for rope in _rope_parameters(config):
        if rope.get("rope_type") == "longrope":
            original = rope.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None
            )
            limit = min(limit, int(original or limit))
    return limit


def _rope_parameters(config: PreTrainedConfig) -> list[dict[str, Any]]:
    parameters = getattr(config, "rope_parameters", None) or {}
    per_layer_type = [value for value in parameters.values() if isinstance(value, dict)]
    return per_layer_type or [parameters]


@torch.no_grad()
def refuse_if_inexact(model: LoadedModel) -> None:
    """The probe. Leaves the model as it was."""
    if model.module.config.get_text_config()._attn_implementation != ATTENTION:
        raise _refusal(model.config, "it did not take our attention implementation")
    rows = _probe_rows(model)
    try:
        leak = _leak(model, rows)
        ours = torch.cat(_packed(model, rows))
    except Unsupported as exc:
        raise _refusal(model.config, exc.message) from exc
    if leak > _LEAK_TOLERANCE:
        raise _refusal(model.config, f"packed rows see one another (by {leak:.1e} nats)")
    error = float((ours - torch.cat(_own_logprobs(model, rows))).abs().max())
    if not error <= _PROBE_TOLERANCE:
        raise _refusal(model.config, f"packed rows differ from its own forward by {error:.1e} nats")


def _probe_rows(model: LoadedModel) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(model.vocab_size, (length,), generator=generator).to(model.device)
        for length in _PROBE_LENGTHS
    ]


def _packed(model: LoadedModel, rows: list[Tensor]) -> list[Tensor]:
    lengths = [len(row) for row in rows]
    tokens = torch.cat(rows)
    hidden = packed_hidden(model, tokens, lengths)
    logprobs = packed_logprobs(model, hidden, tokens.roll(-1))
    return [row[:-1] for row in logprobs.split(lengths)]


def _leak(model: LoadedModel, rows: list[Tensor]) -> float:
    """How far the last row moves when the others' tokens change: must be nothing."""
    others = [(row + 1) % model.vocab_size for row in rows[:-1]]
    moved = _packed(model, rows)[-1] - _packed(model, [*others, rows[-1]])[-1]
    return float(moved.abs().max())


def _own_logprobs(model: LoadedModel, rows: list[Tensor]) -> list[Tensor]:
    """The model's own causal forward, one row at a time, with its own attention and head."""
    model.module.set_attn_implementation("eager")
    try:
        logits = [model.module(input_ids=row[None], use_cache=False).logits[0] for row in rows]
    finally:
        model.module.set_attn_implementation(ATTENTION)
    return [
        value[:-1].float().log_softmax(-1).gather(-1, row[1:, None])[:, 0]
        for value, row in zip(logits, rows, strict=True)
    ]


def _refusal(config: PreTrainedConfig, reason: str) -> Unsupported:
    return Unsupported(
        f"models of type {config.model_type!r} cannot run here yet: {reason}",
        hint="choose a decoder with plain causal or sliding-window attention, e.g. of the Llama,"
        " Qwen3 or Mistral families",
    )
