"""Gradients of 16-bit weights, summed in float32.

autograd gives a weight's gradient in the weight's dtype. One pass's is as good as its products; the sum of
many micro-batches in bfloat16 would lose what the small ones add. So every pass's gradient is taken off
the leaf as soon as it is there. Float32 leaves are left alone: their `.grad` is the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


class GradientAside:
    """Owns hooks on the leaves until `close`."""

    def __init__(self, leaves: Mapping[str, Tensor]) -> None:
        self._sums: dict[str, Tensor] = {}
        self._handles = [
            leaf.requires_grad_(True).register_post_accumulate_grad_hook(self._taking(name))
            for name, leaf in leaves.items()
            if leaf.dtype != torch.float32
        ]

    def take(self) -> dict[str, Tensor]:
        """The sums so far, which are the caller's now."""
        sums, self._sums = self._sums, {}
        return sums

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _taking(self, name: str) -> Callable[[Tensor], None]:
        def take(leaf: Tensor) -> None:
            gradient, leaf.grad = leaf.grad, None
            if gradient is None:
                return
            if name in self._sums:
                self._sums[name].add_(gradient)
            else:
                self._sums[name] = gradient.float()

        return take
