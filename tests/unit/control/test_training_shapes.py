from __future__ import annotations

import pytest

from homefire.control.catalog import CatalogEntry
from homefire.control.shapes import find_shape, generated_shapes, shape_version
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
