from __future__ import annotations

import pytest
import torch
from torch import nn

from homefire.model import attention
from homefire.model.attention import MaskShape, PackedRows, attending, causal_window
from homefire.wire.errors import Unsupported


@pytest.fixture
def projections():
    """query [1, 4, 11, 8], key and value [1, 2, 11, 8]."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(1, heads, 11, 8, generator=generator) for heads in (4, 2, 2))


def written_out(query, key, value, *, scaling, window):
    """One row, every product spelled out."""
    key, value = (tensor.repeat_interleave(2, 1) for tensor in (key, value))
    scores = query @ key.transpose(-1, -2) * (scaling or query.shape[-1] ** -0.5)
    visible = causal_window(query.shape[2], window or query.shape[2], query.device)
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return (weights @ value).transpose(1, 2)


@pytest.mark.parametrize("window", [None, 2, 4, 100])
@pytest.mark.parametrize("scaling", [None, 0.7])
def test_packed_rows_attend_as_each_row_alone(projections, window, scaling):
    lengths = [3, 3, 5]
    packed = PackedRows(lengths).attend(nn.Identity(), *projections, scaling=scaling, window=window)
    rows = [tensor.split(lengths, 2) for tensor in projections]
    alone = [written_out(*row, scaling=scaling, window=window) for row in zip(*rows, strict=True)]
    assert packed.shape == (1, 11, 4, 8)
    torch.testing.assert_close(packed, torch.cat(alone, 1))


def test_a_window_shows_exactly_that_many_keys():
    assert causal_window(4, 2, torch.device("cpu")).sum(-1).tolist() == [1, 2, 2, 2]


def test_the_active_context_ends_with_its_block():
    rows = PackedRows([1])

    def fail_inside():
        with attending(PackedRows([2])):
            raise ZeroDivisionError

    with attending(rows):
        with pytest.raises(ZeroDivisionError):
            fail_inside()
        assert attention._active.get() is rows
    assert attention._active.get() is None


def test_attention_outside_a_context_is_an_error(projections):
    with pytest.raises(RuntimeError, match="attending"):
        attention._attention(nn.Identity(), *projections, None)


@pytest.mark.parametrize(
    ("mask", "arguments", "named"),
    [
        (None, {"softcap": 3.0}, "softcap"),
        (None, {"s_aux": torch.zeros(4)}, "s_aux"),
        (None, {"position_bias": torch.zeros(1)}, "position_bias"),
        (None, {"dropout": 0.1}, "dropout"),
        (MaskShape(6, frozenset({"chunked_overlay"})), {}, "chunked_overlay"),
        (torch.ones(1), {}, "its own attention mask"),
    ],
)
def test_what_the_hook_would_ignore_is_refused_by_name(projections, mask, arguments, named):
    with attending(PackedRows([11])), pytest.raises(Unsupported, match=named):
        attention._attention(nn.Identity(), *projections, mask, **arguments)
