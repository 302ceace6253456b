from __future__ import annotations

import json
from pathlib import Path

import pytest

from homefire.control.capacity import Capacity
from homefire.control.db.rows import Need
from homefire.control.footprint import (
    MICRO_BATCH_TOKENS,
    activation_budget,
    micro_batch_tokens,
)
from homefire.wire.specs import ActivationBudget

GIB = 1 << 30


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Of a model that keeps 24 x 1024 floats per token and layer: 3 MiB per token."""
    shape = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 32}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": shape}))
    return tmp_path


@pytest.mark.parametrize(
    ("memory_gib", "tokens"), [(1000, MICRO_BATCH_TOKENS), (7, 682), (5, 341), (3, 128), (1, 128)]
)
def test_a_micro_batch_takes_half_of_what_the_weights_leave(
    directory: Path, memory_gib: int, tokens: int
) -> None:
    capacity = Capacity(threads=2, memory_bytes=memory_gib * GIB)
    assert micro_batch_tokens(directory, Need(1, 3 * GIB), capacity) == pytest.approx(tokens, abs=1)


def test_a_model_that_does_not_tell_its_shape_gets_what_is_fastest(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    capacity = Capacity(threads=2, memory_bytes=8 * GIB)
    assert micro_batch_tokens(tmp_path, Need(1, GIB), capacity) == MICRO_BATCH_TOKENS


def test_activations_may_take_half_of_what_the_weights_leave(directory: Path) -> None:
    found = activation_budget(
        directory, Need(1, 3 * GIB), Capacity(threads=2, memory_bytes=7 * GIB)
    )
    assert found == ActivationBudget(
        max_bytes=2 * GIB, layer_token_bytes=4 * 24 * 1024, input_token_bytes=4096, num_layers=32
    )
    full = activation_budget(directory, Need(1, 3 * GIB), Capacity(threads=2, memory_bytes=GIB))
    assert full is not None
    assert full.max_bytes == 0


def test_a_model_that_does_not_tell_its_shape_has_no_budget_of_activations(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert activation_budget(tmp_path, Need(1, GIB), Capacity(threads=2, memory_bytes=GIB)) is None
