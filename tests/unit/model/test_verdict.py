from __future__ import annotations

import pytest
import torch

from homefire.model import attention
from homefire.model.attention_rule import AttentionRule
from homefire.model.loading import load_model
from homefire.model.packed import packed_hidden, packed_logprobs
from homefire.wire.errors import Unsupported

LENGTHS = [9, 23, 4, 30, 23]
"""Longer than the windows below."""
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FAMILIES = {
    "llama": {"tie_word_embeddings": True, "attention_bias": True},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "qwen3": {"head_dim": 32},
    "qwen3_moe": {"head_dim": 16, **MOE},
    "mistral": {"sliding_window": 6},
    "gemma3_text": {"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 24},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4},
}


def rows_of(model, lengths=LENGTHS):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(model.vocab_size, (n,), generator=generator) for n in lengths]


@torch.no_grad()
def packed(model, rows):
    tokens = torch.cat(rows)
    hidden = packed_hidden(model, tokens, [len(row) for row in rows])
    return packed_logprobs(model, hidden, tokens.roll(-1))


@torch.no_grad()
def row_by_row(model, rows):
    """Each row alone through the model's own attention; targets roll over the packed order."""
    targets = torch.cat(rows).roll(-1).split([len(row) for row in rows])
    model.module.set_attn_implementation("eager")
    logits = [model.module(input_ids=row[None], use_cache=False).logits[0] for row in rows]
    model.module.set_attn_implementation(attention.ATTENTION)
    return torch.cat(
        [
            values.log_softmax(-1).gather(-1, target[:, None])[:, 0]
            for values, target in zip(logits, targets, strict=True)
        ]
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_equal_the_models_own_forward_row_by_row(make_model, family):
    model = make_model(family, **FAMILIES[family])
    rows = rows_of(model)
    torch.testing.assert_close(packed(model, rows), row_by_row(model, rows), atol=2e-5, rtol=0)


def test_a_dropped_window_would_show(make_model, monkeypatch):
    model = make_model("mistral", sliding_window=6)
    rows = rows_of(model)
    expected = row_by_row(model, rows)
    monkeypatch.setattr(
        attention.PackedRows,
        "attend",
        lambda self, *args, _attend=attention.PackedRows.attend: _attend(
            self, *args[:-1], AttentionRule()
        ),
    )
    assert (packed(model, rows) - expected).abs().max() > 0.1


def test_rows_that_are_not_separated_are_refused_at_load(make_directory, monkeypatch):
    directory = make_directory("qwen3", head_dim=16)
    monkeypatch.setattr(
        attention.PackedRows,
        "__init__",
        lambda self, lengths: vars(self).update(_runs=[(sum(lengths), 1)], _masks={}),
    )
    with pytest.raises(Unsupported, match="see one another"):
        load_model(directory)


@pytest.mark.parametrize(
    ("family", "overrides", "reason"),
    [
        ("falcon", {}, "AttentionInterface"),
        ("bloom", {"n_layer": 2, "n_head": 4}, "AttentionInterface"),
        (
            "mamba2",
            {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1, "expand": 2},
            "it has no attention layers",
        ),
    ],
)
def test_models_that_would_not_be_exact_are_refused_by_name(
    make_directory, family, overrides, reason
):
    directory = make_directory(family, **overrides)
    with pytest.raises(Unsupported, match=reason) as refused:
        load_model(directory)
    assert family in str(refused.value)


def test_longrope_is_exact_up_to_the_length_of_pre_training(make_model):
    model = make_model(
        "phi3",
        sliding_window=None,
        original_max_position_embeddings=64,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "partial_rotary_factor": 1.0,
            "short_factor": [1.0] * 8,
            "long_factor": [4.0] * 8,
            "original_max_position_embeddings": 64,
        },
    )
    assert model.max_context_length == 64
