"""Adapters as PEFT writes them: the names of tensors, and `adapter_config.json`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

PREFIX = "base_model.model."
_FIRST_FACTOR = ".lora_A.weight"


def adapter_config(
    *, rank: int, alpha: float, base_model: str, target_modules: Iterable[str]
) -> dict[str, Any]:
    """`adapter_config.json`. Targets are full paths: leaf names also match other modules."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "target_modules": list(target_modules),
        "use_dora": False,
        "use_rslora": False,
    }


def adapted_modules(tensor_names: Iterable[str]) -> list[str]:
    """The modules that an adapter with these tensors adapts, in their order."""
    return [
        name.removeprefix(PREFIX).removesuffix(_FIRST_FACTOR)
        for name in tensor_names
        if name.endswith(_FIRST_FACTOR)
    ]
