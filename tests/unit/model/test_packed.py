from __future__ import annotations

import pytest
import torch

from homefire.model.head import PLAIN, Head, ScaledLogits
from homefire.model.packed import likeliest_tokens, target_logprobs


@pytest.fixture
def inputs():
    """hidden [7, 5], weight [11, 5], an adapter's x [7, 2] and b [11, 2], bias [11]: all leaves."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((7, 5), (11, 5), (7, 2), (11, 2), (11,))
    return [torch.randn(s, generator=generator).requires_grad_() for s in shapes]


class Written:
    """The same as a `ScaledLogits`, of which only the values are known."""

    def __init__(self, form):
        self.form = form

    def logits(self, hidden, product):
        return self.form.logits(hidden, product)


FORMS = {
    "plain": PLAIN,
    "scaled": ScaledLogits(scale=0.3),
    "soft-capped": ScaledLogits(softcap=1.5),
    "both": ScaledLogits(scale=2.0, softcap=1.5),
    "unknown": Written(ScaledLogits(scale=2.0, softcap=1.5)),
}


def full_logits(hidden, weight, low_rank=None, *, bias=None, scale=1.0, softcap=None):
    logits = hidden @ weight.T + (low_rank[0] @ low_rank[1].T if low_rank else 0)
    logits = scale * (logits + (0 if bias is None else bias))
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def reference(hidden, weight, targets, low_rank=None, **form):
    return full_logits(hidden, weight, low_rank, **form).log_softmax(-1).gather(-1, targets)


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("with_adapter", [False, True])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_chunked_logprobs_and_gradients_equal_the_full_softmax(inputs, chunk, with_adapter, form):
    hidden, weight, x, b, bias = inputs
    leaves = [hidden, weight, bias] + ([x, b] if with_adapter else [])
    low_rank = (x, b) if with_adapter else None
    targets = torch.randint(11, (7, 3), generator=torch.Generator().manual_seed(1))
    targets[:, 1] = targets[:, 0]  # a target named twice counts twice
    grad = torch.randn(7, 3, generator=torch.Generator().manual_seed(2))
    ours = target_logprobs(hidden, Head(weight, bias, form), targets, chunk, low_rank=low_rank)
    terms = vars(form.form if isinstance(form, Written) else form)
    full = reference(hidden, weight, targets, low_rank, bias=bias, **terms)
    torch.testing.assert_close(ours, full)
    torch.testing.assert_close(
        torch.autograd.grad(ours, leaves, grad), torch.autograd.grad(full, leaves, grad)
    )


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_likeliest_tokens_are_those_of_the_full_softmax(inputs, form):
    hidden, weight, x, b, bias = (leaf.detach() for leaf in inputs)
    head, terms = Head(weight, bias, form), vars(form.form if isinstance(form, Written) else form)
    logprobs, tokens = likeliest_tokens(hidden, head, 3, 2, low_rank=(x, b))
    full = full_logits(hidden, weight, (x, b), bias=bias, **terms).log_softmax(-1)
    torch.testing.assert_close(logprobs, full.topk(3).values)
    assert torch.equal(tokens, full.topk(3).indices)


def test_one_target_per_token_keeps_the_targets_shape(inputs):
    targets = torch.arange(7)
    logprobs = target_logprobs(inputs[0], Head(inputs[1]), targets)
    assert logprobs.shape == (7,)
    torch.testing.assert_close(logprobs, reference(inputs[0], inputs[1], targets[:, None])[:, 0])


def test_a_frozen_head_gets_no_gradient(inputs):
    hidden, weight = inputs[0], inputs[1].detach()
    target_logprobs(hidden, Head(weight), torch.arange(7)).sum().backward()
    assert weight.grad is None
    assert hidden.grad is not None
