"""Our own LoRA, unmerged and float32 everywhere: forward = base(x) + scaling * B(A(x)).

Hu et al. 2021 (arXiv:2106.09685). The trainer and the sampler apply the same class, and its files are
PEFT's, so any PEFT reader loads them. Routed experts are fused 3D parameters in transformers, which no
`nn.Linear` adapter reaches: asking for them is refused rather than ignored.

Axes: r rank, I inputs, O outputs of a linear layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from homefire.model.lora_targets import refuse_unknown_head, target_paths
from homefire.model.tensors import tied_to
from homefire.wire.engine import LoraInit
from homefire.wire.errors import InvalidArgument, Unsupported
from homefire.wire.peft import PREFIX, AdapterConfig, adapted_modules, adapter_config

if TYPE_CHECKING:
    from homefire.model.loading import LoadedModel


@dataclass(frozen=True)
class LowRank:
    """The adapter of one linear layer."""

    a: Tensor
    """[r, I]"""
    b: Tensor
    """[O, r]"""


@dataclass(frozen=True)
class LoraAdapter:
    """Low-rank updates by module path, e.g. `model.layers.0.self_attn.q_proj`."""

    rank: int
    alpha: float
    layers: dict[str, LowRank]

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank

    def parameters(self) -> dict[str, Tensor]:
        """Every trainable tensor under PEFT's name, in a fixed order. The live ones, not copies."""
        return {
            f"{PREFIX}{path}.lora_{letter}.weight": tensor
            for path, layer in self.layers.items()
            for letter, tensor in (("A", layer.a), ("B", layer.b))
        }


def new_adapter(
    model: LoadedModel,
    *,
    rank: int,
    alpha: float = 32.0,
    seed: int = 0,
    train_attn: bool = True,
    train_mlp: bool = True,
    train_unembed: bool = True,
    init: LoraInit = LoraInit.KAIMING,
) -> LoraAdapter:
    """A fresh adapter: A random from `seed`, B zero, so it changes nothing at first.

    With tied embeddings `train_unembed` adapts the head alone, never the embedding, as PEFT does.
    """
    paths = target_paths(
        model, train_attn=train_attn, train_mlp=train_mlp, train_unembed=train_unembed
    )
    if rank < 1:
        raise InvalidArgument(f"lora rank {rank} is below 1", field="rank")
    generator = torch.Generator().manual_seed(seed)
    layers: dict[str, LowRank] = {}
    for path in paths:
        linear = _linear(model, path)
        bound = 1 / math.sqrt(linear.in_features)  # kaiming_uniform with a = sqrt(5)
        a = torch.rand(rank, linear.in_features, generator=generator) * (2 * bound) - bound
        if init is LoraInit.NORA:
            a = F.normalize(a, dim=0)
        b = torch.zeros(linear.out_features, rank)
        layers[path] = LowRank(a.to(model.device), b.to(model.device))
    return LoraAdapter(rank, alpha, layers)


@contextmanager
def applied(model: LoadedModel, adapter: LoraAdapter) -> Iterator[None]:
    """The module's linear layers add the adapter's update until the block ends.

    Covers the head when it is called as a module; `target_logprobs` takes the head's update through
    `head_update`.
    """
    with ExitStack() as stack:
        for path, layer in adapter.layers.items():
            hook = _Update(layer, adapter.scaling)
            handle = _linear(model, path).register_forward_hook(hook)
            stack.callback(handle.remove)
        yield


class _Update:
    """A forward hook of a linear layer."""

    def __init__(self, layer: LowRank, scaling: float) -> None:
        self._layer = layer
        self._scaling = scaling

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = F.linear(inputs[0], self._layer.a) * self._scaling
        return output + F.linear(x, self._layer.b)


def head_update(
    model: LoadedModel, adapter: LoraAdapter, hidden: Tensor
) -> tuple[Tensor, Tensor] | None:
    """(x [M, r], b [V, r]) with x @ b.T the head's update, for `target_logprobs`; None without one."""
    layer = adapter.layers.get(model.head_path)
    if layer is None:
        return None
    return F.linear(hidden, layer.a) * adapter.scaling, layer.b


@torch.no_grad()
def merged_tensors(
    model: LoadedModel, adapter: LoraAdapter, base: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The base with the adapter folded in, in float32, rounded to the serving dtype once.

    `base` is the model's `serving_tensors`: nothing is lost by them, since compute weights are their
    values. A head that was tied and is adapted comes with a tensor of its own beside the embedding's:
    see `unties_head`.
    """
    tensors = dict(base)
    if unties_head(model, adapter):
        tensors |= {alias: base[name] for alias, name in tied_to(model).items()}
    for path, layer in adapter.layers.items():
        weight = tensors[f"{path}.weight"].float()
        merged = weight + adapter.scaling * (layer.b @ layer.a).cpu()
        tensors[f"{path}.weight"] = merged.to(model.serving_dtype).contiguous()
    return tensors


def unties_head(model: LoadedModel, adapter: LoraAdapter) -> bool:
    """Whether merging changes a head that shares the embedding's weights."""
    return bool(model.tied) and model.head_path in adapter.layers


def peft_tensors(adapter: LoraAdapter) -> dict[str, Tensor]:
    """`adapter_model.safetensors`: float32 CPU tensors, the adapter's own where it lies there."""
    return {name: tensor.detach().cpu() for name, tensor in adapter.parameters().items()}


def peft_config(adapter: LoraAdapter, *, base_model: str) -> dict[str, Any]:
    """`adapter_config.json`."""
    return adapter_config(
        rank=adapter.rank,
        alpha=adapter.alpha,
        base_model=base_model,
        target_modules=adapter.layers,
    )


def adapter_from_peft(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> LoraAdapter:
    """The adapter of a PEFT directory. Copies, so the caller's buffers stay its own."""
    msgspec.convert(config, AdapterConfig).refuse_other_adapters()
    layers = {
        path: LowRank(
            a=_factor(tensors, path, "A").to(torch.float32, copy=True),
            b=_factor(tensors, path, "B").to(torch.float32, copy=True),
        )
        for path in adapted_modules(tensors)
    }
    if not layers:
        raise InvalidArgument("the adapter holds no lora_A and lora_B tensors")
    known = {f"{PREFIX}{path}.lora_{letter}.weight" for path in layers for letter in "AB"}
    if surplus := sorted(tensors.keys() - known):
        raise Unsupported(
            f"the adapter holds {surplus[0]!r}, which is neither lora_A nor lora_B of a linear layer"
        )
    return LoraAdapter(int(config["r"]), float(config["lora_alpha"]), layers)


def check_fits(model: LoadedModel, adapter: LoraAdapter) -> None:
    """InvalidArgument, naming the first module that the model lacks or has in another shape."""
    modules = dict(model.module.named_modules())
    if model.head_path in adapter.layers:
        refuse_unknown_head(model)
    for path, layer in adapter.layers.items():
        linear = modules.get(path)
        if type(linear) is not nn.Linear:
            raise InvalidArgument(
                f"the adapter is for {path!r}, which {model.architecture!r} does not have",
                hint="it belongs to another base model",
            )
        wanted = (linear.in_features, linear.out_features)
        if (layer.a.shape[1], layer.b.shape[0]) != wanted:
            raise InvalidArgument(
                f"the adapter's {path!r} maps {layer.a.shape[1]} to {layer.b.shape[0]} features,"
                f" the model's {wanted[0]} to {wanted[1]}",
                hint="it belongs to another base model",
            )


def _factor(tensors: Mapping[str, Tensor], path: str, letter: str) -> Tensor:
    name = f"{PREFIX}{path}.lora_{letter}.weight"
    if name not in tensors:
        raise InvalidArgument(f"the adapter lacks {name!r}")
    return tensors[name]


def _linear(model: LoadedModel, path: str) -> nn.Linear:
    module = model.module.get_submodule(path)
    if type(module) is not nn.Linear:
        raise InvalidArgument(f"{path!r} is not a linear layer of {model.architecture!r}")
    return module
