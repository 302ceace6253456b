"""Our own LoRA, unmerged and float32 everywhere: forward = base(x) + scaling * B(A(x)).

Hu et al. 2021 (arXiv:2106.09685). The trainer and the sampler apply the same class, and its files are
PEFT's, so any PEFT reader loads them. Routed experts are 3D parameters in transformers, which no
`nn.Linear` adapter reaches: `experts.py` runs and adapts them.

Axes: r rank, I inputs, O outputs of a linear layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from homefire.model.experts import ExpertBlock, ExpertsLowRank, LowRank, RoutedTokens, block_of
from homefire.model.head import standing_in
from homefire.model.lora_targets import expert_paths, refuse_unknown_head, target_paths
from homefire.model.tensors import tied_to
from homefire.wire.engine import LoraInit
from homefire.wire.errors import InvalidArgument, Unsupported
from homefire.wire.peft import (
    FIRST_PRODUCT,
    PREFIX,
    AdapterConfig,
    adapted_modules,
    adapter_config,
)

if TYPE_CHECKING:
    from homefire.model.loading import LoadedModel


@dataclass(frozen=True)
class LoraAdapter:
    """Low-rank updates by module path, e.g. `model.layers.0.self_attn.q_proj`."""

    rank: int
    alpha: float
    layers: dict[str, LowRank]
    experts: dict[str, ExpertsLowRank] = field(default_factory=dict[str, ExpertsLowRank])
    """Of blocks of routed experts, e.g. `model.layers.0.mlp.experts`."""

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank

    @property
    def device(self) -> torch.device:
        return next(iter(self.low_ranks().values())).a.device

    def low_ranks(self) -> dict[str, LowRank]:
        """Every product's, by the path that PEFT has it under: a block of experts is wrapped once for
        each of its products, the first one inside."""
        found = dict(self.layers)
        for path, block in self.experts.items():
            found |= {f"{path}{FIRST_PRODUCT}": block.up, path: block.down}
        return found

    def parameters(self) -> dict[str, Tensor]:
        """Every trainable tensor under PEFT's name, in a fixed order. The live ones, not copies."""
        return {
            f"{PREFIX}{path}.lora_{letter}.weight": tensor
            for path, layer in self.low_ranks().items()
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
    blocks = expert_paths(model) if train_mlp else []
    if rank < 1:
        raise InvalidArgument(f"lora rank {rank} is below 1", field="rank")
    generator = torch.Generator().manual_seed(seed)

    def fresh(num_inputs: int, num_outputs: int, num_experts: int = 1) -> LowRank:
        bound = 1 / math.sqrt(num_inputs)  # kaiming_uniform with a = sqrt(5)
        a = torch.rand(num_experts * rank, num_inputs, generator=generator) * (2 * bound) - bound
        if init is LoraInit.NORA:
            a = F.normalize(a.unflatten(0, (num_experts, rank)), dim=1).flatten(0, 1)
        b = torch.zeros(num_outputs, rank * num_experts)
        return LowRank(a.to(model.device), b.to(model.device))

    layers: dict[str, LowRank] = {}
    for path in paths:
        linear = _linear(model, path)
        layers[path] = fresh(linear.in_features, linear.out_features)
    experts: dict[str, ExpertsLowRank] = {}
    for path in blocks:
        block = expert_block(model, path)
        up, down = (
            fresh(product.num_inputs, product.num_outputs, block.num_experts)
            for product in (block.up, block.down)
        )
        experts[path] = ExpertsLowRank(up, down)
    return LoraAdapter(rank, alpha, layers, experts)


@contextmanager
def applied(model: LoadedModel, adapter: LoraAdapter) -> Iterator[None]:
    """The module's linear layers and experts add the adapter's update until the block ends.

    Covers the head when it is called as a module; `target_logprobs` takes the head's update through
    `head_update`.
    """
    with ExitStack() as stack:
        for path, layer in adapter.layers.items():
            hook = _Update(layer, adapter.scaling)
            handle = _linear(model, path).register_forward_hook(hook)
            stack.callback(handle.remove)
        for path, low_rank in adapter.experts.items():
            block = expert_block(model, path)
            stack.enter_context(standing_in(block.module, _forward(block, low_rank, adapter)))
        yield


def _forward(
    block: ExpertBlock, low_rank: ExpertsLowRank, adapter: LoraAdapter
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def forward(hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        given = RoutedTokens(hidden, top_k_index, top_k_weights)
        return block.forward(given, low_rank, adapter.scaling)

    return forward


class _Update:
    """A forward hook of a linear layer."""

    def __init__(self, layer: LowRank, scaling: float) -> None:
        self._layer = layer
        self._scaling = scaling

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = F.linear(inputs[0].to(self._layer.a.dtype), self._layer.a) * self._scaling
        return output + F.linear(x, self._layer.b).to(output.dtype)


def head_update(
    model: LoadedModel, adapter: LoraAdapter, hidden: Tensor
) -> tuple[Tensor, Tensor] | None:
    """(x [M, r], b [V, r]) with x @ b.T the head's update, for `target_logprobs`; None without one."""
    layer = adapter.layers.get(model.head_path)
    if layer is None:
        return None
    return F.linear(hidden.to(layer.a.dtype), layer.a) * adapter.scaling, layer.b


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
    for path, low_rank in adapter.experts.items():
        block = expert_block(model, path)
        for product, own in ((block.up, low_rank.up), (block.down, low_rank.down)):
            name = f"{path}.{product.name}"
            merged = tensors[name].float() + adapter.scaling * product.update(own).cpu()
            tensors[name] = merged.to(model.serving_dtype).contiguous()
    return tensors


def unties_head(model: LoadedModel, adapter: LoraAdapter) -> bool:
    """Whether merging changes a head that shares the embedding's weights."""
    return bool(model.tied) and model.head_path in adapter.layers


def peft_tensors(adapter: LoraAdapter) -> dict[str, Tensor]:
    """`adapter_model.safetensors`: float32 CPU tensors, the adapter's own where it lies there."""
    return {name: tensor.detach().cpu() for name, tensor in adapter.parameters().items()}


def peft_config(model: LoadedModel, adapter: LoraAdapter, *, base_model: str) -> dict[str, Any]:
    """`adapter_config.json`."""
    blocks = {path: expert_block(model, path) for path in adapter.experts}
    return adapter_config(
        rank=adapter.rank,
        alpha=adapter.alpha,
        base_model=base_model,
        target_modules=adapter.layers,
        experts={path: (block.up.name, block.down.name) for path, block in blocks.items()},
    )


def adapter_from_peft(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> LoraAdapter:
    """The adapter of a PEFT directory. Copies, so the caller's buffers stay its own."""
    msgspec.convert(config, AdapterConfig).refuse_other_adapters()
    found = {
        path: LowRank(
            a=_factor(tensors, path, "A").to(torch.float32, copy=True),
            b=_factor(tensors, path, "B").to(torch.float32, copy=True),
        )
        for path in adapted_modules(tensors)
    }
    if not found:
        raise InvalidArgument("the adapter holds no lora_A and lora_B tensors")
    known = {f"{PREFIX}{path}.lora_{letter}.weight" for path in found for letter in "AB"}
    if surplus := sorted(tensors.keys() - known):
        raise Unsupported(
            f"the adapter holds {surplus[0]!r}, which is neither lora_A nor lora_B of a linear layer"
        )
    experts = {path: ExpertsLowRank(found[inner], found[path]) for inner, path in _nested(found)}
    layers = {
        path: layer
        for path, layer in found.items()
        if path not in experts and path.removesuffix(FIRST_PRODUCT) not in experts
    }
    return LoraAdapter(int(config["r"]), float(config["lora_alpha"]), layers, experts)


def _nested(found: Mapping[str, LowRank]) -> Iterator[tuple[str, str]]:
    """The paths of the first and the second product of each block of experts."""
    for path in found:
        outer = path.removesuffix(FIRST_PRODUCT)
        if outer != path:
            if outer not in found:
                raise Unsupported(f"the adapter adapts one of the two products of {outer!r}")
            yield path, outer


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
    for path, low_rank in adapter.experts.items():
        _check_experts_fit(model, path, low_rank, adapter.rank)


def _check_experts_fit(model: LoadedModel, path: str, low_rank: ExpertsLowRank, rank: int) -> None:
    block = expert_block(model, path)
    for product, own in ((block.up, low_rank.up), (block.down, low_rank.down)):
        stacked = block.num_experts * rank
        wanted = ((stacked, product.num_inputs), (product.num_outputs, stacked))
        found = (tuple(own.a.shape), tuple(own.b.shape))
        if found != wanted:
            raise InvalidArgument(
                f"the adapter's {product.name!r} of {path!r} has factors {found[0]} and {found[1]},"
                f" the model's {block.num_experts} experts want {wanted[0]} and {wanted[1]}",
                hint="it belongs to another base model, or adapts other parameters of the experts",
            )


def expert_block(model: LoadedModel, path: str) -> ExpertBlock:
    """InvalidArgument where the model has no such experts."""
    modules = dict(model.module.named_modules())
    block = block_of(modules[path]) if path in modules else None
    if block is None:
        raise InvalidArgument(
            f"the adapter is for experts at {path!r}, which {model.architecture!r} does not have",
            hint="it belongs to another base model",
        )
    return block


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
