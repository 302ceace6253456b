from __future__ import annotations

import pytest

from homefire.wire.context_limit import ContextLimit, context_limit

LONG = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 24}


@pytest.mark.parametrize(
    ("config", "num_tokens", "reason"),
    [
        ({}, 2048, ""),
        ({"max_position_embeddings": 256}, 256, ""),
        ({"n_positions": 128}, 128, ""),
        ({"max_position_embeddings": 256, "rope_parameters": LONG}, 24, "longrope rope"),
        (
            {
                "max_position_embeddings": 256,
                "original_max_position_embeddings": 32,
                "rope_scaling": {"type": "su"},
            },
            32,
            "su rope",
        ),
        (
            {"max_position_embeddings": 24, "rope_parameters": {"rope_type": "dynamic"}},
            24,
            "",
        ),
        (
            {
                "max_position_embeddings": 256,
                "rope_parameters": {
                    "full_attention": LONG,
                    "sliding_attention": {"rope_type": "x"},
                },
            },
            24,
            "longest text of the batch",
        ),
        (
            {"max_position_embeddings": 256, "rope_parameters": {"rope_type": "yarn", "factor": 4}},
            256,
            "",
        ),
        (
            {
                "max_position_embeddings": 256,
                "attn_temperature_tuning": True,
                "floor_scale": 64,
            },
            63,
            "place in the batch's row",
        ),
        (
            {"max_position_embeddings": 256, "attn_temperature_tuning": False, "floor_scale": 64},
            256,
            "",
        ),
    ],
)
def test_a_text_may_be_as_long_as_its_numbers_are_its_own(config, num_tokens, reason):
    limit = context_limit(config)
    assert isinstance(limit, ContextLimit)
    assert limit.num_tokens == num_tokens
    assert reason in limit.reason
    assert bool(limit.reason) == bool(reason)
