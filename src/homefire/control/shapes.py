"""Training shapes: what this machine can train, generated from its models. Pure.

For every model of the catalog there are `<model>-full`, `<model>-lora` and `<model>-reference`. A
name of the hosted service such as `accounts/fireworks/trainingShapes/qwen3-8b-128k-h200` stands for
the model that it begins with; whether that model is here is said when a job is created.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from homefire import __version__
from homefire.control.capacity import num_cores
from homefire.control.catalog import CatalogEntry
from homefire.wire.errors import UnknownShape
from homefire.wire.resources import ShapeSnapshot, TrainingShapeVersion
from homefire.wire.specs import TrainerMode

VERSION = "v1"
_VALID_SINCE = "2026-01-01T00:00:00.000000Z"
_SUFFIXES = {
    TrainerMode.FULL: "full",
    TrainerMode.LORA: "lora",
    TrainerMode.FORWARD_ONLY: "reference",
}
_NAME = re.compile(r"^accounts/([^/]+)/trainingShapes/([^/]+)(?:/versions/([^/]+))?$")
_HOSTED = re.compile(r"^(?P<model>.+?)-(?P<context>\d+)k(?:-.*)?$")
_LORA_WORDS = ("lora",)
_REFERENCE_WORDS = ("reference", "forward", "-ref")


@dataclass(frozen=True)
class Shape:
    """A training shape by its parts."""

    account: str
    id: str
    base_model: str
    mode: TrainerMode
    max_context_length: int | None
    """Tokens; None: whatever the model can."""
    is_alias: bool
    """A hosted name: its trainer mode is a guess, so the job's own fields decide."""

    @property
    def name(self) -> str:
        return f"accounts/{self.account}/trainingShapes/{self.id}"

    @property
    def version_name(self) -> str:
        return f"{self.name}/versions/{VERSION}"


def generated_shapes(account: str, entries: Sequence[CatalogEntry]) -> list[Shape]:
    return [
        Shape(
            account=account,
            id=f"{_short(entry.name)}-{suffix}",
            base_model=entry.name,
            mode=mode,
            max_context_length=None,
            is_alias=False,
        )
        for entry in entries
        for mode, suffix in _SUFFIXES.items()
    ]


def find_shape(name: str, account: str, entries: Sequence[CatalogEntry]) -> Shape:
    """The shape of that name, with or without `/versions/…`. UnknownShape says what there is."""
    shapes = generated_shapes(account, entries)
    parts = _NAME.match(name)
    if parts is None:
        raise _unknown(name, shapes)
    owner, shape_id, version = parts.groups()
    for shape in shapes:
        if (shape.account, shape.id) == (owner, shape_id) and version in (None, VERSION):
            return shape
    hosted = _HOSTED.match(shape_id)
    if owner == account or hosted is None:
        raise _unknown(name, shapes)
    return Shape(
        account=owner,
        id=shape_id,
        base_model=f"accounts/{owner}/models/{hosted['model']}",
        mode=_guessed_mode(shape_id),
        max_context_length=int(hosted["context"]) * 1024,
        is_alias=True,
    )


def shape_version(shape: Shape, *, model_context_length: int | None) -> TrainingShapeVersion:
    """The resource. `model_context_length` is None when the model is not on this machine."""
    lengths = [n for n in (shape.max_context_length, model_context_length) if n is not None]
    model = _short(shape.base_model)
    return TrainingShapeVersion(
        name=shape.version_name,
        display_name=shape.id,
        description=f"{shape.mode} of {shape.base_model} on this machine",
        create_time=_VALID_SINCE,
        update_time=_VALID_SINCE,
        snapshot=ShapeSnapshot(
            base_model=shape.base_model,
            trainer_mode=shape.mode,
            trainer_image_tag=f"homefire-{__version__}",
            max_supported_context_length=min(lengths, default=0),
            deployment_shape_version=(
                f"accounts/{shape.account}/deploymentShapes/{model}/versions/{VERSION}"
            ),
            deployment_image_tag=f"homefire-{__version__}",
            accelerator_type="CPU",
            accelerator_count=num_cores(),
            min_total_accelerator_count=1,
        ),
    )


def _guessed_mode(shape_id: str) -> TrainerMode:
    if any(word in shape_id for word in _REFERENCE_WORDS):
        return TrainerMode.FORWARD_ONLY
    if any(word in shape_id for word in _LORA_WORDS):
        return TrainerMode.LORA
    return TrainerMode.FULL


def _short(model: str) -> str:
    return model.rpartition("/")[2]


def _unknown(name: str, shapes: Sequence[Shape]) -> UnknownShape:
    return UnknownShape(
        f"training shape {name!r} is unknown",
        hint="this machine has: " + ", ".join(shape.name for shape in shapes),
        field="trainingShape",
    )
