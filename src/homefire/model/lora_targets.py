"""Which linear layers an adapter adapts: chosen by what a layer does, refused where any would be left out.

Token mixers of every sort (attention, Mamba, gated delta nets, short convolutions) go by `train_attn`,
everything else between the embedding and the head by `train_mlp`, routed experts included, the head by
`train_unembed`. Two kinds of layers are never adapted, as in PEFT: a router (its choice of experts is not a linear map of its
weights), and two layers of a Mamba mixer, its output and its step width (fused kernels read their weights
and never call them).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import nn
from transformers.pytorch_utils import Conv1D

from homefire.model.experts import block_of, fused_experts
from homefire.model.head import ScaledLogits
from homefire.wire.errors import Unsupported

if TYPE_CHECKING:
    from homefire.model.loading import LoadedModel

_MIXING_PATHS = ("attn", "attention")
"""Within any part of a module's path."""
_MIXING_CLASSES = ("attention", "mixer", "mamba", "conv", "deltanet")
"""Within the name of the class that owns a linear layer, in lower case."""


def target_paths(
    model: LoadedModel, *, train_attn: bool, train_mlp: bool, train_unembed: bool
) -> list[str]:
    """Paths of the linear layers that the flags choose, in the module's order."""
    if train_attn or train_mlp:
        _refuse_other_layers(model)
    wanted = {"attn": train_attn, "mlp": train_mlp, "unembed": train_unembed}
    chosen = [path for path, kind in _kinds(model) if wanted[kind]]
    if model.head_path in chosen:
        refuse_unknown_head(model)
    if not chosen:
        raise Unsupported(
            f"no linear layer of {model.architecture!r} models fits these LoRA settings",
            hint="set one of train_attn, train_mlp, train_unembed, or train all parameters",
        )
    return chosen


def refuse_unknown_head(model: LoadedModel) -> None:
    """`lora.head_update` knows the product's input only where the form of the logits is known."""
    if not isinstance(model.logits_form, ScaledLogits):
        raise Unsupported(
            f"LoRA on the head of {model.architecture!r} models is not supported: their logits are more"
            " than a scale or a soft cap of its product",
            hint="set train_unembed to false",
            field="train_unembed",
        )


def expert_paths(model: LoadedModel) -> list[str]:
    """Paths of the blocks of routed experts, in the module's order; Unsupported where one could not be
    adapted."""
    owners = fused_experts(model.module)
    for path, owner in owners.items():
        if block_of(owner) is None:
            raise Unsupported(
                f"LoRA on the routed experts of {model.architecture!r} models is not supported:"
                f" {path!r} is a {type(owner).__name__}, which does not say how its parameters lie",
                hint="set train_mlp to false",
                field="train_mlp",
            )
    return list(owners)


def _kinds(model: LoadedModel) -> Iterator[tuple[str, str]]:
    head = model.head
    for path, module in model.module.named_modules():
        if type(module) is not nn.Linear:
            continue
        owner = model.module.get_submodule(path.rpartition(".")[0])
        if module is head:
            yield path, "unembed"
        elif not _is_read_by_kernels(owner, path):
            yield path, "attn" if _mixes_tokens(owner, path) else "mlp"


def _mixes_tokens(owner: nn.Module, path: str) -> bool:
    name = type(owner).__name__.lower()
    return any(word in path for word in _MIXING_PATHS) or any(
        word in name for word in _MIXING_CLASSES
    )


def _is_read_by_kernels(owner: nn.Module, path: str) -> bool:
    """Of a Mamba mixer, told by its state space parameters A and D."""
    is_mamba = hasattr(owner, "A_log") and hasattr(owner, "D")
    return is_mamba and path.endswith((".out_proj", ".dt_proj"))


def _refuse_other_layers(model: LoadedModel) -> None:
    """Layers that multiply by a matrix without being exactly `nn.Linear` would be left out in silence."""
    for path, module in model.module.named_modules():
        is_subclass = isinstance(module, nn.Linear) and type(module) is not nn.Linear
        if isinstance(module, Conv1D) or (is_subclass and not _is_router(module)):
            raise Unsupported(
                f"LoRA reaches only nn.Linear layers; {path!r} of {model.architecture!r} models is a"
                f" {type(module).__name__}",
                hint="train all parameters, or the head alone (train_attn and train_mlp false)",
            )


def _is_router(module: nn.Module) -> bool:
    return "Router" in type(module).__name__
