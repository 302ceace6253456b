"""Logprobs of targets, and their gradients, without a tensor of tokens x vocabulary.

The head runs in chunks of tokens. A chunk's logits live until its share of the gradients is added up,
where the loss is known (`FusedLoss`). Where it comes later (`TargetLogprobs`), the last chunk's logits
are kept, which is no more than there was at once anyway, and the others are computed again. Both do the same arithmetic in the same order: their gradients are equal bit for bit.
A token whose gradient is zero costs no product in backward.

Axes: M tokens, n tokens of a chunk, H hidden, V vocabulary, K targets per token, r adapter rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from homefire.model.head import PLAIN, ScaledLogits, float32_product

SpanGradientOf = Callable[[Tensor, slice], Tensor]
"""Logprobs [n, K] of the tokens in a slice -> the loss's derivative with respect to them, [n, K]."""


class HeadInputs(NamedTuple):
    """What the logits are made of; each may want a gradient."""

    hidden: Tensor
    """[M, H]"""
    weight: Tensor
    """[V, H]"""
    bias: Tensor | None = None
    """[V]"""
    x: Tensor | None = None
    """[M, r]: an adapter adds x @ b.T to the product."""
    b: Tensor | None = None
    """[V, r]"""

    def logits(self, form: ScaledLogits, span: slice) -> Tensor:
        """float32 [n, V]"""
        product = float32_product(self.hidden[span], self.weight, self.bias)
        if self.x is not None and self.b is not None:
            product.addmm_(self.x[span], self.b.t())
        return form.of(product)


class HeadGradients:
    """Gradients of a `HeadInputs`, added up chunk by chunk."""

    def __init__(self, inputs: HeadInputs, form: ScaledLogits, wants: tuple[bool, ...]) -> None:
        self._inputs = inputs
        self._form = form
        self._sums = [
            _zeros(tensor) if wanted and tensor is not None else None
            for tensor, wanted in zip(inputs, wants, strict=True)
        ]

    def add(
        self, span: slice, logits: Tensor, normalizer: Tensor, targets: Tensor, grad: Tensor
    ) -> None:
        """Uses `logits` [n, V] up. normalizer [n], targets and grad [n, K] are the chunk's."""
        active = (grad != 0).any(-1)
        num_active = int(active.sum())
        if num_active == 0:
            return
        places: slice | Tensor = span
        if num_active < len(active):
            chosen = active.nonzero()[:, 0]
            places = chosen + span.start
            logits, normalizer, targets, grad = (
                tensor[chosen] for tensor in (logits, normalizer, targets, grad)
            )
        slope = self._form.slope(logits)
        # d logprob_k / d logits = onehot(target_k) - softmax
        d = logits.sub_(normalizer[:, None]).exp_()
        d.mul_(-grad.sum(-1, keepdim=True))
        d.scatter_add_(-1, targets, grad)
        if self._form != PLAIN:
            d.mul_(slope)
        self._add_products(d.to(self._inputs.weight.dtype), places)

    def _add_products(self, d: Tensor, places: slice | Tensor) -> None:
        hidden, weight, bias, x, b = self._sums
        given = self._inputs
        if hidden is not None:
            hidden[places] = d @ given.weight
        if weight is not None:
            _add_product(weight, d, given.hidden[places])
        if bias is not None:
            bias.add_(d.sum(0))
        if x is not None and given.b is not None:
            x[places] = d.to(given.b.dtype) @ given.b
        if b is not None and given.x is not None:
            _add_product(b, d, given.x[places])

    def sums(self) -> tuple[Tensor | None, ...]:
        """In the order and dtypes of the inputs."""
        return tuple(
            None if total is None or like is None else total.to(like.dtype)
            for total, like in zip(self._sums, self._inputs, strict=True)
        )


def _zeros(like: Tensor) -> Tensor:
    """Sums over chunks are kept in float32 whatever is computed with."""
    return torch.zeros_like(like, dtype=torch.float32)


def _add_product(total: Tensor, d: Tensor, right: Tensor) -> None:
    """total += d.T @ right"""
    if d.dtype == right.dtype == total.dtype:
        total.addmm_(d.t(), right)
    else:
        total.add_(d.to(right.dtype).t() @ right)


class TargetLogprobs(torch.autograd.Function):
    """apply(targets, form, chunk, *HeadInputs) -> logprobs [M, K]."""

    @staticmethod
    def forward(
        ctx: Any, targets: Tensor, form: ScaledLogits, chunk: int, *tensors: Tensor | None
    ) -> Tensor:
        inputs = _inputs(tensors)
        logprobs, normalizer = _empty(inputs, targets)
        logits: Tensor | None = None
        for span in spans(len(targets), chunk):
            logits = None  # makes room for the next ones
            logits = inputs.logits(form, span)
            _score(logits, targets[span], logprobs[span], normalizer[span])
        ctx.save_for_backward(targets, normalizer, logits, *tensors)
        ctx.form, ctx.chunk, ctx.is_used = form, chunk, False
        return logprobs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        targets, normalizer, last, *tensors = ctx.saved_tensors
        inputs = _inputs(tensors)
        gradients = HeadGradients(inputs, ctx.form, ctx.needs_input_grad[3:])
        if ctx.is_used:
            last = None  # the first backward has used it up
        ctx.is_used = True
        for span in spans(len(targets), ctx.chunk):
            if grad[span].any():
                is_last = span.stop == len(targets)
                logits = inputs.logits(ctx.form, span) if last is None or not is_last else last
                gradients.add(span, logits, normalizer[span], targets[span], grad[span])
        return (None, None, None, *gradients.sums())


class FusedLoss(torch.autograd.Function):
    """apply(targets, form, chunk, gradient_of, *HeadInputs) -> logprobs [M, K], and a handle whose
    `backward()` is that of the loss."""

    @staticmethod
    def forward(
        ctx: Any,
        targets: Tensor,
        form: ScaledLogits,
        chunk: int,
        gradient_of: SpanGradientOf,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        inputs = _inputs(tensors)
        gradients = HeadGradients(inputs, form, ctx.needs_input_grad[4:])
        logprobs, normalizer = _empty(inputs, targets)
        for span in spans(len(targets), chunk):
            logits = inputs.logits(form, span)
            _score(logits, targets[span], logprobs[span], normalizer[span])
            grad = gradient_of(logprobs[span], span)
            gradients.add(span, logits, normalizer[span], targets[span], grad)
        ctx.mark_non_differentiable(logprobs)
        ctx.gradients = gradients.sums()
        return logprobs, logprobs.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        sums, ctx.gradients = ctx.gradients, ()
        return (None, None, None, None, *sums)


def spans(length: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, length)) for start in range(0, length, chunk)]


def _inputs(tensors: Any) -> HeadInputs:
    return HeadInputs(*tensors)


def _empty(inputs: HeadInputs, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Logprobs [M, K] and normalizers [M]."""
    device = inputs.hidden.device
    logprobs = torch.empty(targets.shape, dtype=torch.float32, device=device)
    return logprobs, torch.empty(len(targets), dtype=torch.float32, device=device)


def _score(logits: Tensor, targets: Tensor, logprobs: Tensor, normalizer: Tensor) -> None:
    """Fills the chunk's logprobs [n, K] and normalizers [n]."""
    normalizer.copy_(logits.logsumexp(-1))
    logprobs.copy_(logits.gather(-1, targets) - normalizer[:, None])
