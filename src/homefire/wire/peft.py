"""Adapters as PEFT writes them: the names of tensors, and `adapter_config.json`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import msgspec

from homefire.wire.errors import Unsupported

PREFIX = "base_model.model."
FIRST_PRODUCT = ".base_layer"
"""Behind the path of a block of routed experts: PEFT wraps one once for each of its two products, and
the first wrapper is inside the second."""
_FIRST_FACTOR = ".lora_A.weight"
_FUSED_NAMES = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")
"""A target module of this name is taken by PEFT for the routed experts, where a model has some."""


class AdapterConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What of an `adapter_config.json` matters here."""

    r: int
    lora_alpha: float
    peft_type: str = "LORA"
    base_model_name_or_path: str | None = None
    bias: str = "none"
    alpha_pattern: dict[str, Any] | None = None
    rank_pattern: dict[str, Any] | None = None
    fan_in_fan_out: bool = False
    lora_bias: bool = False
    modules_to_save: list[str] | None = None
    use_bdlora: Any = None
    use_dora: bool = False
    use_qalora: bool = False
    use_rslora: bool = False

    def refuse_other_adapters(self) -> None:
        """Unsupported where lora_A and lora_B mean something else, or are not all there is."""
        if self.peft_type != "LORA":
            raise Unsupported(
                f"adapters of type {self.peft_type} are not supported", hint="use LORA"
            )
        if self.bias != "none":
            raise Unsupported(f"adapters with bias {self.bias!r} are not supported", field="bias")
        for option in _OTHER_ADAPTERS:
            if getattr(self, option):
                raise Unsupported(f"adapters with {option} are not supported", field=option)


_OTHER_ADAPTERS = (
    "alpha_pattern",
    "fan_in_fan_out",
    "lora_bias",
    "modules_to_save",
    "rank_pattern",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "use_rslora",
)


def adapter_config(
    *,
    rank: int,
    alpha: float,
    base_model: str,
    target_modules: Iterable[str],
    experts: Mapping[str, tuple[str, str]] = MappingProxyType({}),
) -> dict[str, Any]:
    """`adapter_config.json`. Targets are full paths: leaf names also match other modules.

    `experts` are the names of the two parameters of each block of routed experts. Beside some, dense
    layers are listed by their weight, or PEFT would drop them with no more than a warning.
    """
    by_weight = [path for path in target_modules if experts and _is_taken_for_experts(path)]
    parameters = [f"{path}.{name}" for path, names in experts.items() for name in names]
    parameters += [f"{path}.weight" for path in by_weight]
    config: dict[str, Any] = {
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
        "target_modules": [path for path in target_modules if path not in by_weight],
        "use_dora": False,
        "use_rslora": False,
    }
    return config | {"target_parameters": parameters} if parameters else config


def _is_taken_for_experts(path: str) -> bool:
    return path.rpartition(".")[2] in _FUSED_NAMES


def refuse_base_weights(tensor_names: Iterable[str]) -> None:
    """Unsupported for weights of the base model beside the adapter: they may differ from the base's."""
    for name in tensor_names:
        if ".base_layer." in name and ".lora_" not in name:
            raise Unsupported(
                f"the adapter's file also holds weights of its base model: {name!r}",
                hint="save it with save_pretrained(..., save_embedding_layers=False)",
            )


def adapted_modules(tensor_names: Iterable[str]) -> list[str]:
    """The modules that an adapter with these tensors adapts, in their order."""
    return [
        name.removeprefix(PREFIX).removesuffix(_FIRST_FACTOR)
        for name in tensor_names
        if name.endswith(_FIRST_FACTOR)
    ]
