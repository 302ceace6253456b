"""Routed experts that transformers keeps as 3D parameters, and their forward with an adapter on each.

transformers marks such a class with `use_experts_implementation`, which also says how its parameters lie.
PEFT adapts the parameters and has one A and one B for all experts of a block, which is how we keep them:
A is expert-major, B rank-major with the expert last.

Axes: T tokens, K experts per token, S = T * K pairs of both, E experts, I inputs, O outputs of a
product, r rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
"""Their weights have more than two dimensions, too, and are no experts."""
_MARKS = ("has_bias", "has_gate", "has_post_expert_norm", "is_transposed", "num_experts")


@dataclass(frozen=True)
class LowRank:
    """The adapter of one product: of a linear layer, or of all experts of a block."""

    a: Tensor
    """[r, I]; of experts [E * r, I]"""
    b: Tensor
    """[O, r]; of experts [O, r * E]"""

    def by_expert(self, num_experts: int) -> list[tuple[Tensor, Tensor]]:
        """A [r, I] and B [O, r] of each expert: views."""
        a_by_expert = self.a.unflatten(0, (num_experts, -1)).unbind(0)
        b_by_expert = self.b.unflatten(1, (-1, num_experts)).unbind(2)
        return list(zip(a_by_expert, b_by_expert, strict=True))


@dataclass(frozen=True)
class ExpertsLowRank:
    """The adapter of one block of routed experts."""

    up: LowRank
    """Of the first product: of gate and up together where there is a gate."""
    down: LowRank


class RoutedTokens(NamedTuple):
    """What a block of experts is called with."""

    hidden_TI: Tensor
    experts_TK: Tensor
    """int64, the router's choice."""
    shares_TK: Tensor
    """The weight of each chosen expert's output."""

    def split(self, cuts: list[int]) -> Iterator[RoutedTokens]:
        """Neighbouring tokens, `cuts[0]` of them and so on."""
        return map(RoutedTokens, *(tensor.split(cuts) for tensor in self))

    def rows(self, rows: slice | Tensor) -> RoutedTokens:
        return RoutedTokens(*(tensor[rows] for tensor in self))


@dataclass(frozen=True)
class Product:
    """One of a block's two products."""

    name: str
    """The parameter's, e.g. `gate_up_proj`."""
    weight: Tensor
    """[E, O, I], or [E, I, O] where transposed."""
    bias: Tensor | None
    """[E, O]"""
    is_transposed: bool

    @property
    def num_inputs(self) -> int:
        return self.weight.shape[1 if self.is_transposed else 2]

    @property
    def num_outputs(self) -> int:
        return self.weight.shape[2 if self.is_transposed else 1]

    def update(self, low_rank: LowRank) -> Tensor:
        """B @ A of every expert, as the weight lies."""
        pairs = low_rank.by_expert(len(self.weight))
        return torch.stack([(b @ a).t() if self.is_transposed else b @ a for a, b in pairs])


class ExpertBlock:
    """A view of a module of routed experts whose class transformers has marked."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._marked = cast(Any, module)

    @property
    def num_experts(self) -> int:
        return len(self.up.weight)

    @property
    def up(self) -> Product:
        return self._product("gate_up_proj" if self._marked.has_gate else "up_proj")

    @property
    def down(self) -> Product:
        return self._product("down_proj")

    def _product(self, name: str) -> Product:
        bias = getattr(self._marked, f"{name}_bias") if self._marked.has_bias else None
        return Product(name, getattr(self._marked, name), bias, self._marked.is_transposed)

    def forward(
        self, given: RoutedTokens, low_rank: ExpertsLowRank | None, scaling: float
    ) -> Tensor:
        """The block's own forward, [T, O], each expert with its adapter: tokens are sorted by expert,
        and every expert's go through its two products together.

        `given` are the tokens of one adapter: what they become depends on no others.
        """
        per_token = given.experts_TK.shape[1]
        experts_S, order_S = given.experts_TK.flatten().sort(stable=True)
        counts = torch.bincount(experts_S, minlength=self.num_experts).tolist()
        x = given.hidden_TI[order_S // per_token]
        up = None if low_rank is None else low_rank.up
        down = None if low_rank is None else low_rank.down
        x = _products(x, counts, self.up, up, scaling)
        x = self._marked._apply_gate(x) if self._marked.has_gate else self._marked.act_fn(x)
        x = _products(x, counts, self.down, down, scaling)
        if self._marked.has_post_expert_norm:
            x = self._marked.post_expert_norm(x)
        x = x * given.shares_TK.flatten()[order_S, None]
        of_token = x[order_S.argsort()].unflatten(0, (-1, per_token)).sum(1)
        return of_token.to(given.hidden_TI.dtype)


def _products(
    x_SI: Tensor, counts: list[int], product: Product, low_rank: LowRank | None, scaling: float
) -> Tensor:
    """[S, O]: the tokens of expert 0 first, `counts[0]` of them, and so on."""
    factors = None if low_rank is None else low_rank.by_expert(len(counts))
    outputs: list[Tensor] = []
    for expert, tokens in enumerate(x_SI.split(counts)):
        if not len(tokens):
            continue
        weight = product.weight[expert]
        bias = None if product.bias is None else product.bias[expert]
        y = F.linear(tokens, weight.t() if product.is_transposed else weight, bias)
        if factors is not None:
            a, b = factors[expert]
            low = F.linear(tokens.to(a.dtype), a) * scaling
            y = y + F.linear(low, b).to(y.dtype)
        outputs.append(y)
    return torch.cat(outputs)


def fused_experts(module: nn.Module) -> dict[str, nn.Module]:
    """Every module that owns 3D parameters, by path: no adapter of an `nn.Linear` reaches those."""
    return {
        path: owner
        for path, owner in module.named_modules()
        if not isinstance(owner, _CONVOLUTIONS) and _stacked(owner)
    }


def block_of(owner: nn.Module) -> ExpertBlock | None:
    """None where the class is not marked, or has other parameters than a block's two products."""
    if not all(hasattr(owner, mark) for mark in _MARKS):
        return None
    block = ExpertBlock(owner)
    expected = ["gate_up_proj" if cast(Any, owner).has_gate else "up_proj", "down_proj"]
    return block if _stacked(owner) == expected else None


def _stacked(owner: nn.Module) -> list[str]:
    return [name for name, tensor in owner.named_parameters(recurse=False) if tensor.dim() == 3]
