from __future__ import annotations

import pytest
from transformers import AutoConfig

from homefire.trainer.engine.pass_budget import LARGEST_PASS, SMALLEST_PASS, pass_budget
from homefire.trainer.engine.torch_engine import torch_engine
from homefire.trainer.front.plan import execution_plan

GIB = 1 << 30
QWEN3_4B = AutoConfig.for_model(
    "qwen3", hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32
)
LAYER_TOKEN = 2 * (12 * 2560 + 4 * 9728)
BILLION = 10**9


def budget(free_gib: int, num_parameters: int = 4 * BILLION):
    return pass_budget(
        QWEN3_4B, free_bytes=free_gib * GIB, num_parameters=num_parameters, number_bytes=2
    )


def test_the_optimizers_room_is_kept_and_most_of_the_rest_is_for_activations():
    found = budget(130)
    room = int(0.6 * (130 * GIB - 64 * BILLION))
    assert found.activations.max_bytes == room
    assert found.activations.layer_token_bytes == LAYER_TOKEN
    assert found.activations.input_token_bytes == 2 * 2560
    assert found.micro_batch_tokens == room // (36 * LAYER_TOKEN)


@pytest.mark.parametrize(("free_gib", "tokens"), [(8, SMALLEST_PASS), (4000, LARGEST_PASS)])
def test_a_pass_is_neither_too_small_nor_too_large(free_gib, tokens):
    assert budget(free_gib).micro_batch_tokens == tokens


def test_a_row_that_is_over_the_budget_is_planned_to_recompute_what_it_must():
    found = budget(100)
    tokens = found.micro_batch_tokens
    plan = execution_plan(
        [2 * tokens, tokens // 2], token_budget=tokens, threads=1, activations=found.activations
    )
    assert plan.micro_batches == [[0], [1]]
    layers, none = plan.recompute
    assert none == 0
    kept = (36 - layers) * LAYER_TOKEN + layers * 2 * 2560
    assert 2 * tokens * kept <= found.activations.max_bytes
    assert 17 <= layers <= 22


def test_a_cpu_leaves_the_budget_to_the_jobs_spec(make_trainer_of):
    assert make_trainer_of(torch_engine, "job-1").opened.pass_budget is None
