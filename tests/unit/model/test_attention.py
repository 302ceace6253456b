from __future__ import annotations

import pytest
import torch
from torch import nn

from homefire.model import attention
from homefire.model.attention import MaskShape, PackedRows, attending
from homefire.model.attention_rule import AttentionRule, Reach
from homefire.wire.errors import Unsupported


@pytest.fixture
def projections():
    """query [1, 4, 11, 8], key [1, 2, 11, 8], value [1, 2, 11, 5]: value is narrower, as in MLA."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, 8), (2, 8), (2, 5))
    return tuple(torch.randn(1, heads, 11, d, generator=generator) for heads, d in shapes)


SINKS = torch.tensor([0.5, -1.0, 2.0, 0.0])
RULES = {
    "plain": AttentionRule(),
    "scaling": AttentionRule(scaling=0.7),
    "window": AttentionRule(Reach(window=2)),
    "wide window": AttentionRule(Reach(window=100)),
    "chunk": AttentionRule(Reach(chunk=2)),
    "soft cap": AttentionRule(softcap=0.5),
    "sinks": AttentionRule(sinks=SINKS),
    "all": AttentionRule(Reach(window=3), scaling=0.7, softcap=0.5, sinks=SINKS),
}


def written_out(query, key, value, rule):
    """One row [1, H|G, n, D] -> [1, n, H, Dv], a query and a head at a time."""
    num_heads, length = query.shape[1:3]
    output = torch.zeros(1, length, num_heads, value.shape[3])
    scaling = query.shape[3] ** -0.5 if rule.scaling is None else rule.scaling
    window, chunk = rule.reach.window or length, rule.reach.chunk or length
    for head in range(num_heads):
        shared = head // (num_heads // key.shape[1])
        for at in range(length):
            seen = [k for k in range(at + 1) if at - k < window and at // chunk == k // chunk]
            scores = key[0, shared, seen] @ query[0, head, at] * scaling
            if rule.softcap is not None:
                scores = rule.softcap * (scores / rule.softcap).tanh()
            weights = scores.exp()
            total = weights.sum() + (0 if rule.sinks is None else rule.sinks[head].exp())
            output[0, at, head] = (weights / total) @ value[0, shared, seen]
    return output


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_packed_rows_attend_as_each_row_alone(projections, rule):
    lengths = [3, 3, 4, 1]
    packed = PackedRows(lengths).attend(nn.Identity(), *projections, rule)
    rows = [tensor.split(lengths, 2) for tensor in projections]
    alone = [written_out(*row, rule) for row in zip(*rows, strict=True)]
    assert packed.shape == (1, 11, 4, 5)
    torch.testing.assert_close(packed, torch.cat(alone, 1))


def test_a_reach_shows_exactly_the_keys_of_its_window_or_chunk():
    positions = torch.arange(4)
    assert Reach(window=2).visible(positions, positions).sum(-1).tolist() == [1, 2, 2, 2]
    assert Reach(chunk=2).visible(positions, positions).sum(-1).tolist() == [1, 2, 1, 2]
    assert Reach().visible(positions, positions).sum(-1).tolist() == [1, 2, 3, 4]


def test_a_rule_names_the_terms_that_fused_kernels_seldom_have():
    assert RULES["window"].uncommon == ()
    assert RULES["chunk"].uncommon == ("chunked attention",)
    assert RULES["all"].uncommon == ("a soft cap on attention scores", "attention sinks")


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
        (None, {"position_bias": torch.zeros(1)}, "position_bias"),
        (None, {"dropout": 0.1}, "dropout"),
        (MaskShape(Reach(window=6), frozenset({"or_masks"})), {}, "or_masks"),
        (torch.ones(1), {}, "its own attention mask"),
    ],
)
def test_what_the_hook_would_ignore_is_refused_by_name(projections, mask, arguments, named):
    with attending(PackedRows([11])), pytest.raises(Unsupported, match=named):
        attention._attention(nn.Identity(), *projections, mask, **arguments)
