"""The gradient of a step: checked, measured and clipped. Shared by both engines; no torch.

Norms are of the accumulated gradient divided by the step's divisor, before clipping.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from homefire.wire.engine import AdamParams, GradNormMetrics
from homefire.wire.errors import NonFiniteGradient

LARGEST_GRADIENT = 1e19
"""Above it a squared gradient leaves float32."""


@dataclass(frozen=True)
class GradientNorms:
    by_parameter: Mapping[str, float]

    @property
    def total(self) -> float:
        return math.hypot(*self.by_parameter.values())

    def check(self) -> None:
        """NonFiniteGradient names the first parameter that is NaN, infinite or too large to square."""
        for name, norm in self.by_parameter.items():
            if not norm < LARGEST_GRADIENT:
                raise NonFiniteGradient(
                    f"the gradient of {name!r} has norm {norm}; nothing was stepped and the"
                    " gradient was cleared",
                    hint="check the batch's weights and advantages, or clip them",
                )

    def clipping(self, adam: AdamParams) -> float:
        """What the gradient is multiplied by so that its norm stays within the limit."""
        limit = adam.grad_clip_norm
        return min(1.0, limit / (self.total + 1e-6)) if limit > 0 else 1.0

    def metrics(
        self, asked: GradNormMetrics, adam: AdamParams, *, weight_norm: float, largest: float
    ) -> dict[str, float]:
        """`largest` is the gradient's largest absolute element."""
        if asked is GradNormMetrics.OFF:
            return {}
        clipping = self.clipping(adam)
        basic = {
            "grad_norm_clipped": self.total * clipping,
            "grad_clip_scale": clipping,
            "grad_max_abs": largest,
            "weight_norm": weight_norm,
        }
        if asked is GradNormMetrics.BASIC:
            return basic
        return basic | {f"grad_norm/{name}": norm for name, norm in self.by_parameter.items()}
