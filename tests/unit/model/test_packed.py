from __future__ import annotations

import pytest
import torch

from homefire.model.packed import target_logprobs


@pytest.fixture
def inputs():
    """hidden [7, 5], weight [11, 5], and an adapter's x [7, 2] and b [11, 2], all leaves."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((7, 5), (11, 5), (7, 2), (11, 2))
    return [torch.randn(s, generator=generator).requires_grad_() for s in shapes]


def reference(hidden, weight, targets, low_rank=None):
    logits = hidden @ weight.T + (low_rank[0] @ low_rank[1].T if low_rank else 0)
    return logits.log_softmax(-1).gather(-1, targets)


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("with_adapter", [False, True])
def test_chunked_logprobs_and_gradients_equal_the_full_softmax(inputs, chunk, with_adapter):
    hidden, weight, x, b = inputs
    leaves = inputs if with_adapter else inputs[:2]
    low_rank = (x, b) if with_adapter else None
    targets = torch.randint(11, (7, 3), generator=torch.Generator().manual_seed(1))
    targets[:, 1] = targets[:, 0]  # a target named twice counts twice
    grad = torch.randn(7, 3, generator=torch.Generator().manual_seed(2))
    ours = target_logprobs(hidden, weight, targets, chunk, low_rank=low_rank)
    full = reference(hidden, weight, targets, low_rank)
    torch.testing.assert_close(ours, full)
    torch.testing.assert_close(
        torch.autograd.grad(ours, leaves, grad), torch.autograd.grad(full, leaves, grad)
    )


def test_one_target_per_token_keeps_the_targets_shape(inputs):
    targets = torch.arange(7)
    logprobs = target_logprobs(inputs[0], inputs[1], targets)
    assert logprobs.shape == (7,)
    torch.testing.assert_close(logprobs, reference(inputs[0], inputs[1], targets[:, None])[:, 0])


def test_a_frozen_head_gets_no_gradient(inputs):
    hidden, weight = inputs[0], inputs[1].detach()
    target_logprobs(hidden, weight, torch.arange(7)).sum().backward()
    assert weight.grad is None
    assert hidden.grad is not None
