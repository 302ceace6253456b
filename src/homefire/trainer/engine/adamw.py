"""Decoupled AdamW in place on float32 tensors (Loshchilov & Hutter 2019, arXiv:1711.05101).

m = beta1 m + (1 - beta1) g            v = beta2 v + (1 - beta2) g^2
w -= lr (m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay w)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from homefire.trainer.engine.gradient_norms import GradientNorms
from homefire.wire.engine import AdamParams


class AdamW:
    """First and second moments by parameter name, and t, the number of updates."""

    def __init__(self, masters: Mapping[str, Tensor]) -> None:
        self.updates = 0
        self.first = {name: torch.zeros_like(master) for name, master in masters.items()}
        self.second = {name: torch.zeros_like(master) for name, master in masters.items()}

    @torch.no_grad()
    def step(
        self,
        masters: Mapping[str, Tensor],
        gradient: Mapping[str, Tensor],
        params: AdamParams,
        *,
        scale: float,
    ) -> float:
        """Updates `masters` with `scale * gradient`; a missing gradient is zero. Returns the norm of
        the update."""
        self.updates += 1
        squares = 0.0
        for name, master in masters.items():
            update = self._update(name, master, gradient.get(name), params, scale)
            squares += norm_of(update) ** 2
            master.sub_(update)
        return math.sqrt(squares)

    def _update(
        self,
        name: str,
        master: Tensor,
        gradient: Tensor | None,
        params: AdamParams,
        scale: float,
    ) -> Tensor:
        first, second = self.first[name].mul_(params.beta1), self.second[name].mul_(params.beta2)
        if gradient is not None:
            scaled = gradient * scale
            first.add_(scaled, alpha=1 - params.beta1)
            second.addcmul_(scaled, scaled, value=1 - params.beta2)
        deviation = (second / (1 - params.beta2**self.updates)).sqrt_().add_(params.eps)
        update = (first / (1 - params.beta1**self.updates)).div_(deviation)
        return update.add_(master, alpha=params.weight_decay).mul_(params.learning_rate)


def gradient_norms(
    gradient: Mapping[str, Tensor],
    divisor: float,
    across_ranks: Callable[[Sequence[float]], list[float]] = list,
) -> GradientNorms:
    """`across_ranks` turns norms of this rank's parts into those of whole tensors."""
    norms = across_ranks([norm_of(tensor) for tensor in gradient.values()])
    divided = (norm / divisor for norm in norms)
    return GradientNorms(dict(zip(gradient, divided, strict=True)))


def norm_of(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.detach(), dtype=torch.float64))
