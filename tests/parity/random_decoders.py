"""Small random decoders of many architectures, one configuration per mechanism, with unit-gain weights.

With the usual initial deviation of 0.02 a broken mask or a dropped layer hides in noise.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from homefire.model.head import PLAIN
from homefire.model.loading import LoadedModel, load_model

VOCABULARY = 97
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
}
_DELTA_NET = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "head_dim": 16,
}
_MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_d_state": 16,
    "mamba_chunk_size": 8,
    "mamba_n_groups": 1,
}


def _alternating(first: str, second: str) -> list[str]:
    return [first, second, first, second]


DENSE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama_tied_bias": (
        "llama",
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "qwen3_tied": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "phi3": ("phi3", {"sliding_window": 6}),
    "phi": ("phi", {}),
    "gemma3": ("gemma3_text", {"head_dim": 16, "sliding_window": 6}),
    "gemma3n": (
        "gemma3n_text",
        {
            "head_dim": 16,
            "sliding_window": 6,
            "num_kv_shared_layers": 2,
            "layer_types": _alternating("sliding_attention", "full_attention"),
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCABULARY,
            "activation_sparsity_pattern": [0.0] * 4,
            "laurel_rank": 8,
        },
    ),
    "gpt_neox": ("gpt_neox", {}),
    "opt": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "granite": ("granite", {"logits_scaling": 3.0, "attention_multiplier": 0.2}),
}
ROUTED: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("qwen3_moe", {**_EXPERTS, "num_experts": 8, "head_dim": 16}),
    "glm4_moe": (
        "glm4_moe",
        {
            **_EXPERTS,
            "head_dim": 16,
            "n_routed_experts": 8,
            "first_k_dense_replace": 1,
            "n_shared_experts": 1,
        },
    ),
    "deepseek_v3": (
        "deepseek_v3",
        {
            **_LATENT,
            **_EXPERTS,
            "n_routed_experts": 8,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
    ),
    "gpt_oss": (
        "gpt_oss",
        {"head_dim": 16, "sliding_window": 6, "num_local_experts": 8, "num_experts_per_tok": 2},
    ),
    "llama4": (
        "llama4_text",
        {
            "head_dim": 16,
            "intermediate_size_mlp": 96,
            "num_local_experts": 4,
            "attention_chunk_size": 6,
            "no_rope_layers": [1, 0, 1, 0],
            "layer_types": _alternating("chunked_attention", "full_attention"),
        },
    ),
}
HYBRID: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_5": (
        "qwen3_5_text",
        {**_DELTA_NET, "layer_types": _alternating("linear_attention", "full_attention")},
    ),
    "qwen3_next": (
        "qwen3_next",
        {
            **_EXPERTS,
            **_DELTA_NET,
            "num_experts": 8,
            "shared_expert_intermediate_size": 32,
            "layer_types": _alternating("linear_attention", "full_attention"),
        },
    ),
    "falcon_h1": ("falcon_h1", {**_MAMBA, "mamba_d_ssm": 128, "lm_head_multiplier": 0.5}),
    "granitemoehybrid": (
        "granitemoehybrid",
        {
            **_MAMBA,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 32,
            "layer_types": _alternating("mamba", "attention"),
            "logits_scaling": 3.0,
        },
    ),
    "bamba": ("bamba", {**_MAMBA, "attn_layer_indices": [1, 3]}),
    "nemotron_h": (
        "nemotron_h",
        {
            "layers_block_type": ["mamba", "attention", "mlp", "mamba"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 32,
            "ssm_state_size": 16,
            "n_groups": 1,
            "chunk_size": 8,
            "head_dim": 16,
        },
    ),
    "jamba": (
        "jamba",
        {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "mamba_d_state": 8,
            "mamba_dt_rank": 8,
            "use_mamba_kernels": False,
        },
    ),
    "lfm2": (
        "lfm2",
        {"layer_types": _alternating("conv", "full_attention"), "block_multiple_of": 16},
    ),
}
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}),
    "mamba2": (
        "mamba2",
        {
            "num_heads": 8,
            "head_dim": 16,
            "state_size": 16,
            "n_groups": 1,
            "chunk_size": 8,
            "expand": 2,
        },
    ),
    "minimax": (
        "minimax",
        {
            "head_dim": 16,
            "block_size": 8,
            "num_local_experts": 4,
            "layer_types": _alternating("linear_attention", "full_attention"),
        },
    ),
}
_ALL = {**DENSE, **ROUTED, **HYBRID, **REFUSED}


def random_decoder(name: str, *, seed: int = 0) -> PreTrainedModel:
    model_type, overrides = _ALL[name]
    return decoder_of(model_type, overrides, seed=seed)


def decoder_of(model_type: str, overrides: dict[str, Any], *, seed: int = 0) -> PreTrainedModel:
    """Float32, eager attention, in eval mode; equal for equal arguments."""
    config = _config(model_type, overrides)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"  # the others know no float64
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # parameters that keep their own initial values
        module = AutoModelForCausalLM.from_config(config).float().eval()
    _unit_gain(module, seed + 1)
    return module


def as_loaded(module: PreTrainedModel) -> LoadedModel:
    """Around a module that keeps its own attention and whose own forward gives the logits."""
    config = module.config.get_text_config()
    return LoadedModel(
        module=module,
        config=config,
        architecture=str(config.model_type),
        vocab_size=VOCABULARY,
        max_context_length=256,
        serving_dtype=torch.float32,
        tied=frozenset(),
        logits_form=PLAIN,
    )


def saved(module: PreTrainedModel, directory: Path) -> Path:
    module.save_pretrained(directory)
    return directory


def load(directory: Path) -> LoadedModel:
    return load_model(directory, serving_dtype="float32")


def _config(model_type: str, overrides: dict[str, Any]):
    """Some configurations derive what others take: those refuse it by name."""
    values = {**COMMON, **overrides}
    while True:
        try:
            return AutoConfig.for_model(model_type, **values)
        except (TypeError, AttributeError, ValueError) as exc:
            derived = [key for key in values if key in str(exc) and key not in overrides]
            if not derived:
                raise
            for key in derived:
                del values[key]


@torch.no_grad()
def _unit_gain(module: PreTrainedModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    embeddings = {
        id(table.weight)
        for table in (module.get_input_embeddings(), module.get_output_embeddings())
        if isinstance(table, nn.Module)
    }
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if id(parameter) in embeddings:
            parameter.copy_(noise * 0.25)
        elif "A_log" in name or "dt_" in name or name.endswith(".D"):
            continue  # decays and step widths: their own initial values are what is stable
        elif parameter.dim() >= 2:
            fan_in = 4 if "conv" in name else parameter.shape[-1]
            parameter.copy_(noise / math.sqrt(fan_in))
        elif "sink" in name:
            parameter.copy_(noise)
        else:
            parameter.add_(noise * 0.1)
    for name, buffer in module.named_buffers():
        if "e_score_correction" in name:
            buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.1)
