"""Decoder layers whose activations are computed again in backward instead of being kept.

Such a layer keeps its input alone. Its second forward is the first one again, operation for operation, so
that gradients are the same bits on CPU. It runs in backward, long after the pass has left its contexts:
attention and adapters are entered anew for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from homefire.model.head import standing_in

if TYPE_CHECKING:
    from homefire.model.loading import LoadedModel

Reentry = Callable[[], AbstractContextManager[None]]
"""Enters a context that a forward ran in, for running a part of it again."""


def decoder_layers(model: LoadedModel) -> list[nn.Module]:
    """The blocks of the outermost module list, whatever the family calls it."""
    for module in model.backbone.modules():
        if isinstance(module, nn.ModuleList):
            return list(module)
    return []


@contextmanager
def recomputing(
    model: LoadedModel, num_layers: int, reentries: Sequence[Reentry]
) -> Iterator[None]:
    """Until the block ends, passes keep only the inputs of the first `num_layers` decoder layers."""
    with ExitStack() as stack:
        for layer in decoder_layers(model)[:num_layers] if torch.is_grad_enabled() else []:
            stack.enter_context(standing_in(layer, _Recomputed(layer.forward, reentries)))
        yield


class _Recomputed:
    """Stands in for a layer's forward."""

    def __init__(self, forward: Callable[..., Any], reentries: Sequence[Reentry]) -> None:
        self._forward = forward
        self._reentries = reentries

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Every family hands hidden states over first."""
        return checkpoint(
            self._forward,
            _KeptInput.apply(hidden),
            *args,
            use_reentrant=False,
            preserve_rng_state=False,  # nothing is random: models run in eval mode
            context_fn=lambda: (nullcontext(), self._again()),
            **kwargs,
        )

    @contextmanager
    def _again(self) -> Iterator[None]:
        with ExitStack() as stack:
            for reentry in self._reentries:
                stack.enter_context(reentry())
            yield


class _KeptInput(torch.autograd.Function):
    """The same tensor, kept where autograd's hooks see it: `checkpoint` keeps it out of their sight, and
    what a graph takes is counted by them."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        ctx.save_for_backward(hidden)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]
