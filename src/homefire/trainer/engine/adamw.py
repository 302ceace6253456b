"""Decoupled AdamW in place on float32 tensors (Loshchilov & Hutter 2019, arXiv:1711.05101).

m = beta1 m + (1 - beta1) g            v = beta2 v + (1 - beta2) g^2
w = (1 - lr weight_decay) w - lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)

The arithmetic is torch's own fused kernel, one pass over the four tensors, piece by piece. While a piece
is in the cache, the update is measured and the new weights are rounded to what is served.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from homefire.trainer.engine.gradient_norms import GradientNorms
from homefire.trainer.engine.pieces import pieces, round_into, sum_of_squares
from homefire.wire.engine import AdamParams


@dataclass(frozen=True)
class Served:
    """Where the rounded weights go: the module's parameters, under the masters' names."""

    live: Mapping[str, Tensor]
    dtype: torch.dtype


@dataclass(frozen=True)
class Update:
    """What a step did."""

    norm: float
    """Of what was added to the masters."""
    num_moved: int
    """Elements whose served value is another now."""


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
        served: Served | None = None,
    ) -> Update:
        """Updates `masters` with `scale * gradient`, and `served` with what they are then; a missing
        gradient is zero."""
        self.updates += 1
        squares, num_moved = 0.0, 0
        for name, master in masters.items():
            moments = pieces(self.first[name]), pieces(self.second[name])
            given = gradient.get(name)
            gradients = (None,) * len(moments[0]) if given is None else pieces(given)
            live = pieces(served.live[name]) if served else (None,) * len(moments[0])
            for part, g, m, v, copy in zip(pieces(master), gradients, *moments, live, strict=True):
                squares += self._step_piece(part, g, m, v, params, scale)
                if served is not None and copy is not None:
                    num_moved += round_into(copy, part, served.dtype)
        return Update(math.sqrt(squares), num_moved)

    def _step_piece(
        self,
        master: Tensor,
        gradient: Tensor | None,
        first: Tensor,
        second: Tensor,
        params: AdamParams,
        scale: float,
    ) -> float:
        """Returns the sum of the update's squares."""
        before = master.detach().clone()
        scaled = torch.zeros_like(master) if gradient is None else gradient * scale
        # The kernel of torch.optim.AdamW(fused=True), without what that spends on each tensor's turn.
        torch.ops.aten._fused_adamw_(
            [master],
            [scaled],
            [first],
            [second],
            [],
            [torch.tensor(float(self.updates), device=master.device)],
            lr=params.learning_rate,
            beta1=params.beta1,
            beta2=params.beta2,
            weight_decay=params.weight_decay,
            eps=params.eps,
            amsgrad=False,
            maximize=False,
        )
        return sum_of_squares(before.sub_(master))


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
    return math.sqrt(sum_of_squares(tensor))
