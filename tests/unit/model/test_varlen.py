"""What is handed to torch's variable-length kernel, against a kernel written out here: the real one runs
on CUDA alone (tests/gpu)."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from homefire.model import attention, varlen
from homefire.model.attention import PackedRows
from homefire.model.attention_rule import AttentionRule, Reach
from homefire.model.varlen import VarlenRows, fits, window_size

LENGTHS = [5, 1, 9, 9, 14]
BF16 = torch.bfloat16


def kernel(q, k, v, edges_q, edges_k, max_q, max_k, *, scale, window_size, enable_gqa):
    """`varlen_attn` as its documentation has it, a row and a head at a time: a window of (left, right)
    shows so many keys beside the query's own, -1 all of them."""
    assert edges_q.dtype == edges_k.dtype == torch.int32
    assert max_q == max_k == int(edges_q.diff().max())
    assert enable_gqa == (q.shape[1] != k.shape[1])
    left, right = window_size
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    output = torch.empty_like(q)
    group = q.shape[1] // k.shape[1]
    for start, stop in zip(edges_q.tolist(), edges_q.tolist()[1:], strict=False):
        place = torch.arange(stop - start)
        behind = place[:, None] - place
        seen = (behind >= -right) if right >= 0 else torch.ones_like(behind, dtype=torch.bool)
        seen = seen & (behind <= left) if left >= 0 else seen
        for head in range(q.shape[1]):
            rows = slice(start, stop)
            scores = q[rows, head] @ k[rows, head // group].T * scale
            weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
            output[rows, head] = weights @ v[rows, head // group]
    return output


def tensors(heads: int = 4, groups: int = 2, width: int = 16):
    generator = torch.Generator().manual_seed(1)
    shape = (1, groups, sum(LENGTHS), width)
    query = torch.randn(1, heads, sum(LENGTHS), width, generator=generator)
    return query, *(torch.randn(*shape, generator=generator) for _ in range(2))


RULES = {
    "plain": AttentionRule(),
    "window": AttentionRule(Reach(window=4)),
    "window of one": AttentionRule(Reach(window=1)),
    "wide window": AttentionRule(Reach(window=99)),
    "scaling": AttentionRule(scaling=0.7),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_rows_through_the_kernel_are_the_rows_of_the_rule(rule, groups):
    query, key, value = tensors(groups=groups)
    rows = VarlenRows(LENGTHS, query.device)
    ours = rows.attend(query, key, value, rule, kernel)
    theirs = PackedRows(LENGTHS).attend(SimpleNamespace(), query, key, value, rule)
    assert ours.shape == theirs.shape == (1, sum(LENGTHS), 4, 16)
    torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=0)


def test_a_window_that_is_counted_as_the_rule_counts_it_shows():
    """The kernel's own documentation calls (W, 0) a window of W."""
    query, key, value = tensors()
    rule = RULES["window"]
    wrong = replace(rule, reach=Reach(window=5))
    rows = VarlenRows(LENGTHS, query.device)
    assert window_size(wrong) == (4, 0)
    ours, theirs = (rows.attend(query, key, value, each, kernel) for each in (wrong, rule))
    assert (ours - theirs).abs().max() > 0.05


def test_packed_rows_take_the_kernel_where_it_runs_and_only_there(monkeypatch):
    query, key, value = tensors()
    calls = []

    def counted(*args, **options):
        calls.append(options["window_size"])
        return kernel(*args, **options)

    monkeypatch.setattr(attention.varlen, "runs", lambda q, v, rule: not rule.uncommon)
    monkeypatch.setattr(varlen, "_varlen_attn", lambda: counted)
    rows, module = PackedRows(LENGTHS), SimpleNamespace()
    for rule in (RULES["window"], RULES["plain"]):
        rows.attend(module, query, key, value, rule)
    assert calls == [(3, 0), (-1, 0)]
    capped = AttentionRule(softcap=3.0)
    found = rows.attend(module, query, key, value, capped)
    monkeypatch.setattr(attention.varlen, "runs", lambda q, v, rule: False)
    assert torch.equal(found, rows.attend(module, query, key, value, capped))
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("dtype", "widths", "rule", "expected"),
    [
        (BF16, (128, 128), AttentionRule(), True),
        (torch.float16, (64, 64), AttentionRule(Reach(window=9), scaling=0.3), True),
        (torch.float32, (64, 64), AttentionRule(), False),
        (BF16, (24, 12), AttentionRule(), False),
        (BF16, (288, 288), AttentionRule(), False),
        (BF16, (20, 20), AttentionRule(), False),
        (BF16, (64, 64), AttentionRule(softcap=30.0), False),
        (BF16, (64, 64), AttentionRule(sinks=torch.zeros(4)), False),
        (BF16, (64, 64), AttentionRule(Reach(chunk=6)), False),
    ],
)
def test_the_kernel_takes_only_what_it_has(dtype, widths, rule, expected):
    assert fits(dtype, *widths, rule) is expected


def test_no_tensor_of_a_cpu_goes_to_the_kernel():
    query = torch.zeros(1, 2, 3, 64, dtype=BF16)
    assert not varlen.runs(query, query, AttentionRule())
