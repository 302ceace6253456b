"""Model families, one configuration per mechanism of attention or head.

Weights are of unit gain and bfloat16 values, windows and chunks are 6 and texts longer, so that mistakes show.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from parity.random_decoders import VOCABULARY, decoder_of

WINDOW = 6


@dataclass(frozen=True)
class Family:
    model_type: str
    overrides: dict[str, Any] = field(default_factory=dict)
    shows: str = ""
    """What this configuration has that a plain Llama has not."""
    is_core: bool = False
    """Part of `make test`, not of `make test-families` only."""


def _alternating(first: str, second: str) -> list[str]:
    return [first, second, first, second]


_SLIDING = _alternating("sliding_attention", "full_attention")
_ROUTED = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LOCAL_EXPERTS = {"num_local_experts": 8, "num_experts_per_tok": 2}
_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
_DELTA_NET = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "head_dim": 16,
    "layer_types": _alternating("linear_attention", "full_attention"),
}
_MAMBA = {
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_d_state": 16,
    "mamba_chunk_size": 8,
    "mamba_n_groups": 1,
}
_GEMMA_3N = {
    "head_dim": 16,
    "sliding_window": WINDOW,
    "num_kv_shared_layers": 2,
    "layer_types": _SLIDING,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
}
_LLAMA_4 = {
    "head_dim": 16,
    "intermediate_size_mlp": 96,
    "num_local_experts": 4,
    "attention_chunk_size": WINDOW,
    "no_rope_layers": [1, 0, 1, 0],
    "layer_types": _alternating("chunked_attention", "full_attention"),
}


def _longrope(original: int) -> dict[str, Any]:
    return {
        "sliding_window": None,
        "original_max_position_embeddings": original,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "partial_rotary_factor": 1.0,
            "short_factor": [1.0] * 8,
            "long_factor": [4.0] * 8,
            "original_max_position_embeddings": original,
        },
    }


def _dynamic(limit: int) -> dict[str, Any]:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    return {"max_position_embeddings": limit, "rope_parameters": rope}


PACKED: dict[str, Family] = {
    "llama": Family("llama", {}, "nothing: the plain case"),
    "llama_tied_bias": Family(
        "llama",
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
        "tied head, biases",
    ),
    "llama3_rope": Family(
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
        "llama3 rope",
        is_core=True,
    ),
    "llama_yarn": Family(
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
        "yarn rope",
    ),
    "llama_dynamic": Family("llama", _dynamic(64), "dynamic rope, up to its limit"),
    "qwen2": Family("qwen2", {}, "query, key and value biases"),
    "qwen2_sliding": Family(
        "qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
        "window in the upper layers",
        is_core=True,
    ),
    "qwen3": Family("qwen3", {"head_dim": 32}, "query and key norms"),
    "qwen3_tied": Family(
        "qwen3", {"head_dim": 32, "tie_word_embeddings": True}, "query and key norms, tied head"
    ),
    "mistral": Family("mistral", {"sliding_window": WINDOW}, "window", is_core=True),
    "ministral3": Family(
        "ministral3",
        {
            "sliding_window": None,
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 4,
                "llama_4_scaling_beta": 0.5,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
            },
        },
        "query scale by position",
    ),
    "mixtral": Family("mixtral", {**_LOCAL_EXPERTS, "sliding_window": WINDOW}, "window, experts"),
    "phi": Family("phi", {}, "head bias", is_core=True),
    "phi3": Family("phi3", {"sliding_window": WINDOW}, "window, fused projections"),
    "phi3_longrope": Family("phi3", _longrope(64), "longrope, up to its limit"),
    "olmo2": Family("olmo2", {}, "norms after the blocks"),
    "olmo3": Family("olmo3", {"sliding_window": WINDOW}, "window"),
    "olmoe": Family("olmoe", {"num_experts": 8, "num_experts_per_tok": 2}, "experts"),
    "gemma2": Family(
        "gemma2",
        {
            "head_dim": 16,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 2.0,
        },
        "window, soft caps on scores and logits, scaling",
        is_core=True,
    ),
    "gemma3": Family(
        "gemma3_text",
        {
            "head_dim": 16,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 24,
            "layer_types": _SLIDING,
        },
        "window and rope by layer type, scaling",
    ),
    "gemma3n": Family(
        "gemma3n_text",
        {**_GEMMA_3N, "activation_sparsity_pattern": [0.0] * 4, "laurel_rank": 8},
        "shared keys and values, window, scaling, soft cap on logits",
    ),
    "gemma4": Family(
        "gemma4_text",
        {**_GEMMA_3N, "global_head_dim": 32},
        "widths by layer, shared keys and values, sliced masks",
        is_core=True,
    ),
    "gpt_oss": Family(
        "gpt_oss",
        {**_LOCAL_EXPERTS, "head_dim": 16, "sliding_window": WINDOW},
        "sinks, window, experts",
        is_core=True,
    ),
    "glm4": Family("glm4", {"head_dim": 16}, "partial rope"),
    "glm4_moe": Family(
        "glm4_moe",
        {
            "head_dim": 16,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
            "n_shared_experts": 1,
            "use_qk_norm": True,
        },
        "routed and shared experts",
    ),
    "glm4_moe_lite": Family(
        "glm4_moe_lite", {**_LATENT, "n_group": 1, "topk_group": 1}, "latent attention (MLA)"
    ),
    "smollm3": Family("smollm3", {"no_rope_layer_interval": 2}, "layers without rope"),
    "qwen2_moe": Family(
        "qwen2_moe",
        {
            **_ROUTED,
            "shared_expert_intermediate_size": 32,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 2,
        },
        "window in the mask only",
        is_core=True,
    ),
    "qwen3_moe": Family("qwen3_moe", {**_ROUTED, "head_dim": 16}, "experts"),
    "deepseek_v3": Family(
        "deepseek_v3",
        {**_LATENT, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1},
        "latent attention (MLA): values narrower than keys",
        is_core=True,
    ),
    "granite": Family(
        "granite",
        {
            "logits_scaling": 3.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.7,
            "embedding_multiplier": 2.0,
        },
        "scaling, scaled logits",
        is_core=True,
    ),
    "granitemoe": Family(
        "granitemoe",
        {**_LOCAL_EXPERTS, "logits_scaling": 3.0, "attention_multiplier": 0.2},
        "scaling, scaled logits, experts",
    ),
    "cohere": Family("cohere", {"logit_scale": 0.5}, "scaled logits"),
    "cohere2": Family(
        "cohere2", {"logit_scale": 0.5, "sliding_window": WINDOW}, "window, scaled logits", True
    ),
    "starcoder2": Family("starcoder2", {"sliding_window": WINDOW}, "window"),
    "gpt_neox": Family("gpt_neox", {}, "parallel blocks"),
    "nemotron": Family("nemotron", {}, "squared activations"),
    "opt": Family("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64}, "learned positions"),
    "gpt2": Family(
        "gpt2",
        {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 256},
        "learned positions; no LoRA (Conv1D)",
    ),
    "stablelm": Family("stablelm", {}, "partial rope"),
    "llama4": Family("llama4_text", _LLAMA_4, "chunks, in the mask only", is_core=True),
}
"""Exact in packed training and in flat decode."""

REFUSED: dict[str, Family] = {
    "falcon": Family("falcon", {}, "own attention classes", is_core=True),
    "bloom": Family("bloom", {"n_layer": 4, "n_head": 4}, "ALiBi", is_core=True),
    "deepseek_v32": Family(
        "deepseek_v32",
        {
            **_LATENT,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "index_topk": 6,
            "index_n_heads": 2,
            "index_head_dim": 16,
        },
        "sparse attention by an indexer",
        is_core=True,
    ),
    "mamba2": Family(
        "mamba2",
        {
            "num_heads": 8,
            "head_dim": 16,
            "state_size": 16,
            "n_groups": 1,
            "chunk_size": 8,
            "expand": 2,
        },
        "no attention at all",
        is_core=True,
    ),
}

HYBRID: dict[str, Family] = {
    "qwen3_next": Family(
        "qwen3_next",
        {**_ROUTED, **_DELTA_NET, "shared_expert_intermediate_size": 32},
        "gated delta net",
    ),
    "qwen3_5": Family("qwen3_5_text", _DELTA_NET, "gated delta net"),
    "falcon_h1": Family(
        "falcon_h1",
        {**_MAMBA, "mamba_d_ssm": 128, "mamba_d_conv": 4, "lm_head_multiplier": 0.5},
        "mamba beside attention",
    ),
    "granitemoehybrid": Family(
        "granitemoehybrid",
        {
            **_MAMBA,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 32,
            "layer_types": _alternating("mamba", "attention"),
            "logits_scaling": 3.0,
        },
        "mamba layers",
    ),
    "bamba": Family("bamba", {**_MAMBA, "attn_layer_indices": [1, 3]}, "mamba layers"),
    "nemotron_h": Family(
        "nemotron_h",
        {
            "layers_block_type": ["mamba", "attention", "mamba", "attention"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 32,
            "ssm_state_size": 16,
            "n_groups": 1,
            "chunk_size": 8,
            "head_dim": 16,
        },
        "mamba layers",
    ),
    "jamba": Family(
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
        "mamba layers, experts",
    ),
    "lfm2": Family(
        "lfm2",
        {"layer_types": _alternating("conv", "full_attention"), "block_multiple_of": 16},
        "short convolutions",
    ),
    "minimax": Family(
        "minimax",
        {
            "head_dim": 16,
            "block_size": 8,
            "num_local_experts": 4,
            "layer_types": _alternating("linear_attention", "full_attention"),
        },
        "a cache class of its own",
    ),
}
"""State between tokens beside attention."""

FAMILIES = {**PACKED, **HYBRID, **REFUSED}


def made(name: str, parent: Path) -> Path:
    """A directory with that family's model; made once."""
    directory = parent / name
    if not directory.exists():
        family = FAMILIES[name]
        module = decoder_of(family.model_type, family.overrides)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(parameter.bfloat16())
        module.save_pretrained(directory)
    return directory
