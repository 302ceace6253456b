"""Several adapters in one packed pass, differentiable: to its own tokens each adds its own update.

The base product of a linear layer runs once over the tokens of all rows; then every adapter that has
the layer adds `scaling * B(A(x))` to its segment of them, in place. Forward and backward keep to the
segment throughout, so no number of one adapter's rows reaches another's gradient, NaN included; only
the shape of the base's product is shared, and with it the order of its sums.

Routed experts run once for each segment instead: how many tokens an expert gets is a matter of the
numbers in them, and the bits of the other segments must not be.

Axes: T tokens of one pass, S tokens of a segment, r rank, I inputs, O outputs of a linear layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from homefire.model.experts import ExpertBlock, LowRank, RoutedTokens, block_of, fused_experts
from homefire.model.head import standing_in
from homefire.model.layout import RowLayout
from homefire.model.lora import LoraAdapter

if TYPE_CHECKING:
    from homefire.model.loading import LoadedModel


@dataclass(frozen=True)
class Segment:
    """Neighbouring tokens of a pass, and the adapter that they have."""

    adapter: LoraAdapter
    num_tokens: int


def reaches_segments(model: LoadedModel, adapter: LoraAdapter) -> bool:
    """Whether every layer of the adapter is one that is called once with all tokens of a pass, in their
    packed order."""
    if model.layout is not RowLayout.PACKED:
        return False
    modules = dict(model.module.named_modules())
    return all(type(modules.get(path)) is nn.Linear for path in adapter.layers)


@contextmanager
def applied_by_segment(model: LoadedModel, segments: Sequence[Segment]) -> Iterator[None]:
    """Until the block ends, linear layers and experts add to each segment of their tokens its adapter's
    update.

    The segments cover the tokens of each pass in order. Covers the head when it is called as a module;
    `target_logprobs` takes a segment's share of it through `head_update`.
    """
    paths = {path: None for segment in segments for path in segment.adapter.layers}
    with ExitStack() as stack:
        for path in paths:
            linear = model.module.get_submodule(path)
            handle = linear.register_forward_hook(_Update(_parts(path, segments)))
            stack.callback(handle.remove)
        for path, owner in fused_experts(model.module).items():
            block = block_of(owner)
            if block is not None:
                stack.enter_context(standing_in(owner, _forward(path, block, segments)))
        yield


def _forward(
    path: str, block: ExpertBlock, segments: Sequence[Segment]
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Of a block of experts: each segment's tokens with its own adapter, if that has the block."""
    cuts = [segment.num_tokens for segment in segments]

    def forward(hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        _check_tokens(len(hidden), sum(cuts))
        given = RoutedTokens(hidden, top_k_index, top_k_weights).split(cuts)
        outputs = [
            block.forward(own, segment.adapter.experts.get(path), segment.adapter.scaling)
            for segment, own in zip(segments, given, strict=True)
        ]
        return torch.cat(outputs)

    return forward


def _check_tokens(found: int, expected: int) -> None:
    if found != expected:
        raise ValueError(
            f"a layer was called with {found} of the pass's {expected} tokens: segments of adapters do"
            " not fit"
        )


def add_product(y_SO: Tensor, low_Sr: Tensor, b: Tensor, scaling: float) -> None:
    """y += scaling * low @ B.T, in place. An adapter is float32 whatever the layer computes in."""
    if y_SO.dtype == b.dtype:
        y_SO.addmm_(low_Sr, b.t(), alpha=scaling)
    else:
        y_SO.add_(low_Sr @ b.t(), alpha=scaling)


@dataclass(frozen=True)
class _Part:
    """One segment's share of one layer."""

    tokens: slice
    layer: LowRank
    scaling: float


def _parts(path: str, segments: Sequence[Segment]) -> tuple[int, list[_Part]]:
    """All tokens, and the parts of the segments whose adapter has the layer."""
    parts: list[_Part] = []
    start = 0
    for segment in segments:
        stop = start + segment.num_tokens
        layer = segment.adapter.layers.get(path)
        if layer is not None:
            parts.append(_Part(slice(start, stop), layer, segment.adapter.scaling))
        start = stop
    return start, parts


class _Update:
    """A forward hook of a linear layer, whose fresh output it changes in place."""

    def __init__(self, found: tuple[int, list[_Part]]) -> None:
        self._num_tokens, self._parts = found

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x_TI, y_TO = inputs[0].flatten(0, -2), output.view(-1, output.shape[-1])
        _check_tokens(len(x_TI), self._num_tokens)
        factors = [factor for part in self._parts for factor in (part.layer.a, part.layer.b)]
        spans = [(part.tokens, part.scaling) for part in self._parts]
        return _AddLowRank.apply(y_TO, x_TI, spans, *factors).view(output.shape)


class _AddLowRank(torch.autograd.Function):
    """y[tokens] += scaling * (x[tokens] @ A.T) @ B.T for each (tokens, scaling) with its (A, B)."""

    @staticmethod
    def forward(
        ctx: Any,
        y_TO: Tensor,
        x_TI: Tensor,
        spans: list[tuple[slice, float]],
        *factors: Tensor,
    ) -> Tensor:
        lows: list[Tensor] = []
        for (tokens, scaling), a, b in zip(spans, factors[::2], factors[1::2], strict=True):
            low_Sr = F.linear(x_TI[tokens].to(a.dtype), a)
            add_product(y_TO[tokens], low_Sr, b, scaling)
            lows.append(low_Sr)
        ctx.mark_dirty(y_TO)
        ctx.spans = spans
        ctx.save_for_backward(x_TI, *factors, *lows)
        return y_TO

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (grad_TO,) = grads
        num_spans = len(ctx.spans)
        x_TI, *saved = ctx.saved_tensors
        factors, lows = saved[: 2 * num_spans], saved[2 * num_spans :]
        grad_x = torch.zeros_like(x_TI) if ctx.needs_input_grad[1] else None
        grad_factors: list[Tensor] = []
        for index, (tokens, scaling) in enumerate(ctx.spans):
            a, b = factors[2 * index : 2 * index + 2]
            grad_SO = grad_TO[tokens].to(b.dtype)
            grad_low_Sr = (grad_SO @ b).mul_(scaling)
            grad_factors += [
                grad_low_Sr.t() @ x_TI[tokens].to(a.dtype),
                (grad_SO.t() @ lows[index]).mul_(scaling),
            ]
            if grad_x is not None:
                grad_x[tokens] = grad_low_Sr @ a
        return grad_TO, grad_x, None, *grad_factors
