from __future__ import annotations

import pytest

from homefire.control.catalog import CatalogEntry
from homefire.control.shapes import (
    accelerators_named,
    find_shape,
    generated_shapes,
    shape_version,
)
from homefire.wire.errors import UnknownShape
from homefire.wire.specs import TrainerMode

ENTRIES = [CatalogEntry("accounts/local/models/tiny", "built-in")]


def test_every_model_has_a_shape_per_trainer_mode() -> None:
    assert [(shape.id, shape.mode) for shape in generated_shapes("local", ENTRIES)] == [
        ("tiny-full", TrainerMode.FULL),
        ("tiny-lora", TrainerMode.LORA),
        ("tiny-reference", TrainerMode.FORWARD_ONLY),
    ]


@pytest.mark.parametrize(
    "name",
    [
        "accounts/local/trainingShapes/tiny-full",
        "accounts/local/trainingShapes/tiny-full/versions/v1",
    ],
)
def test_a_shape_is_found_with_and_without_its_version(name: str) -> None:
    assert find_shape(name, "local", ENTRIES).version_name.endswith("tiny-full/versions/v1")


@pytest.mark.parametrize(
    ("name", "model", "mode", "context"),
    [
        ("qwen3-8b-128k-h200", "qwen3-8b", TrainerMode.FULL, 131072),
        ("qwen3-8b-128k", "qwen3-8b", TrainerMode.FULL, 131072),
        ("qwen3-8b-32k-lora", "qwen3-8b", TrainerMode.LORA, 32768),
        ("qwen3-8b-32k-reference", "qwen3-8b", TrainerMode.FORWARD_ONLY, 32768),
    ],
)
def test_a_hosted_name_stands_for_the_model_that_it_begins_with(
    name: str, model: str, mode: TrainerMode, context: int
) -> None:
    shape = find_shape(f"accounts/fireworks/trainingShapes/{name}", "local", ENTRIES)
    assert shape.base_model == f"accounts/fireworks/models/{model}"
    assert (shape.mode, shape.max_context_length) == (mode, context)


@pytest.mark.parametrize(
    "name",
    [
        "accounts/local/trainingShapes/qwen3-8b-128k",
        "accounts/fireworks/trainingShapes/nonsense",
        "accounts/local/trainingShapes/tiny-full/versions/v2",
        "tiny-full",
        "accounts/../trainingShapes/x/y/z",
    ],
)
def test_an_unknown_shape_is_told_what_there_is(name: str) -> None:
    with pytest.raises(UnknownShape, match="accounts/local/trainingShapes/tiny-full"):
        find_shape(name, "local", ENTRIES)


def test_a_shapes_context_is_the_smaller_of_what_it_names_and_what_the_model_can() -> None:
    shape = find_shape("accounts/fireworks/trainingShapes/q-128k", "local", ENTRIES)
    lengths = [
        shape_version(shape, model_context_length=n).snapshot.max_supported_context_length
        for n in (2048, None, 1 << 20)
    ]
    assert lengths == [2048, 131072, 131072]


def test_shapes_of_several_ranks_go_up_to_what_the_machine_has() -> None:
    shapes = generated_shapes("local", ENTRIES, max_ranks=5)
    counts = {shape.id: shape.ranks for shape in shapes if shape.mode is TrainerMode.FULL}
    assert counts == {"tiny-full": 1, "tiny-full-x2": 2, "tiny-full-x4": 4}
    assert len(shapes) == 9


def test_any_number_of_ranks_is_found_by_name_and_counted_as_accelerators() -> None:
    shape = find_shape("accounts/local/trainingShapes/tiny-lora-x3/versions/v1", "local", ENTRIES)
    assert (shape.mode, shape.ranks) == (TrainerMode.LORA, 3)
    snapshot = shape_version(shape, model_context_length=2048).snapshot
    assert (snapshot.accelerator_count, snapshot.min_total_accelerator_count) == (3, 3)
    assert "3 engine ranks" in shape_version(shape, model_context_length=2048).description


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("qwen3-8b-128k-h200-x8", 8),
        ("qwen3-8b-128k-h200x8", 8),
        ("qwen3-8b-128k-8xh200-lora", 8),
        ("qwen3-8b-128k-16x", 16),
        ("qwen3-8b-128k-h200", None),
        ("mixtral-8x7b-32k-h200", None),
        ("tiny-full-x2", None),
    ],
)
def test_a_hosted_name_may_count_accelerators_behind_its_context_length(
    name: str, count: int | None
) -> None:
    assert accelerators_named(f"accounts/fireworks/trainingShapes/{name}") == count


def test_a_hosted_name_that_counts_accelerators_is_one_rank_here() -> None:
    name = "accounts/fireworks/trainingShapes/qwen3-8b-128k-h200-x8"
    assert find_shape(name, "local", ENTRIES).ranks == 1
