from __future__ import annotations

import pytest
import torch

from homefire.model.head import PLAIN, Head, ScaledLogits
from homefire.model.packed import fused_backward, likeliest_tokens, target_logprobs


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


def gradients_of(leaves):
    found = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    return found


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("masked", [(), (1, 4), (0, 1, 2), range(7)], ids=str)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_fused_backward_is_that_of_two_sweeps_bit_for_bit(inputs, chunk, masked, form):
    hidden, weight, x, b, bias = inputs
    head, targets = Head(weight, bias, form), torch.arange(14).reshape(7, 2) % 11
    grad = torch.randn(7, 2, generator=torch.Generator().manual_seed(2))
    grad[list(masked)] = 0
    later = target_logprobs(hidden, head, targets, chunk, low_rank=(x, b))
    if grad.any():
        later.backward(grad)
    apart = gradients_of(inputs)
    at_once = fused_backward(
        hidden, head, targets, lambda logprobs, span: grad[span], chunk, low_rank=(x, b)
    )
    assert torch.equal(at_once, later)
    for ours, theirs in zip(gradients_of(inputs), apart, strict=True):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)


def test_the_loss_is_asked_for_each_chunk_with_its_own_logprobs(inputs):
    hidden, weight = inputs[:2]
    targets, seen = torch.arange(7)[:, None], []

    def gradient_of(logprobs, span):
        seen.append((span, logprobs.clone()))
        return torch.zeros_like(logprobs)

    whole = fused_backward(hidden, Head(weight), targets, gradient_of, 3)
    assert [span for span, _ in seen] == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert torch.equal(torch.cat([logprobs for _, logprobs in seen]), whole)
    assert weight.grad is None  # nothing to push


def test_a_token_without_gradient_costs_no_product_and_adds_nothing(inputs):
    """Even where its numbers are not finite."""
    hidden, weight = inputs[:2]
    with torch.no_grad():
        hidden[2] = float("inf")
    grad = torch.ones(7, 1)
    grad[2] = 0
    target_logprobs(hidden, Head(weight), torch.arange(7)[:, None], 4).backward(grad)
    assert weight.grad.isfinite().all()
    assert not hidden.grad[2].any()


@pytest.mark.parametrize("form", [PLAIN, FORMS["unknown"]], ids=["plain", "unknown"])
def test_a_backward_that_others_share_runs_where_there_is_nothing_to_push(inputs, form):
    hidden, weight = inputs[:2]
    targets, ran = torch.arange(7)[:, None], []
    hidden.register_hook(ran.append)

    def nothing(logprobs, span):
        return torch.zeros_like(logprobs)

    fused_backward(hidden, Head(weight, form=form), targets, nothing)
    assert not ran
    fused_backward(hidden, Head(weight, form=form), targets, nothing, always=True)
    assert len(ran) == 1
    assert not ran[0].any()
