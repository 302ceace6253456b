"""Training shapes: what this machine can train, generated from its models. Pure.

For every model of the catalog there are `<model>-full`, `<model>-lora` and `<model>-reference`, and
the same with `-x2`, `-x4`, … for engines of several ranks; any other number of ranks is found by name,
too. A name of the hosted service such as `accounts/fireworks/trainingShapes/qwen3-8b-128k-h200-x8`
stands for the model that it begins with; whether that model is here is said when a job is created, and
the accelerators that it counts are not this machine's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from homefire import __version__
from homefire.control.catalog import CatalogEntry
from homefire.wire.errors import UnknownShape
from homefire.wire.resources import ShapeSnapshot, TrainingShapeVersion
from homefire.wire.specs import TrainerMode

VERSION = "v1"
ACCELERATOR = "CPU"
"""What a rank computes on, unless the control plane was started for another accelerator: the
`acceleratorType` of this machine's shapes."""
_VALID_SINCE = "2026-01-01T00:00:00.000000Z"
_SUFFIXES = {
    TrainerMode.FULL: "full",
    TrainerMode.LORA: "lora",
    TrainerMode.FORWARD_ONLY: "reference",
}
_NAME = re.compile(r"^accounts/([^/]+)/trainingShapes/([^/]+)(?:/versions/([^/]+))?$")
_RANKS = re.compile(r"^(?P<one>.+)-x(?P<ranks>\d{1,3})$")
_HOSTED_COUNT = re.compile(r"(?:^|-)(?:[a-z]+\d*)?x(\d+)(?=-|$)|(?:^|-)(\d+)x(?:[a-z]+\d*)?(?=-|$)")
"""`-x8`, `-h200x8`, `-8x`, `-8xh200`."""
_HOSTED = re.compile(r"^(?P<model>.+?)-(?P<context>\d+)k(?P<rest>-.*)?$")
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
    ranks: int = 1
    """Processes of the engine."""

    @property
    def name(self) -> str:
        return f"accounts/{self.account}/trainingShapes/{self.id}"

    @property
    def version_name(self) -> str:
        return f"{self.name}/versions/{VERSION}"


def generated_shapes(
    account: str, entries: Sequence[CatalogEntry], *, max_ranks: int = 1
) -> list[Shape]:
    """With 1, 2, 4, … ranks, up to `max_ranks`."""
    return [
        _with_ranks(shape, ranks)
        for shape in _single(account, entries)
        for ranks in _powers_of_two(max_ranks)
    ]


def _single(account: str, entries: Sequence[CatalogEntry]) -> list[Shape]:
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


def _with_ranks(shape: Shape, ranks: int) -> Shape:
    return shape if ranks == 1 else replace(shape, id=f"{shape.id}-x{ranks}", ranks=ranks)


def _powers_of_two(limit: int) -> Iterator[int]:
    power = 1
    while power <= limit:
        yield power
        power *= 2


def find_shape(name: str, account: str, entries: Sequence[CatalogEntry]) -> Shape:
    """The shape of that name, with or without `/versions/…`. UnknownShape says what there is."""
    shapes = _single(account, entries)
    parts = _NAME.match(name)
    if parts is None:
        raise _unknown(name, shapes)
    owner, shape_id, version = parts.groups()
    one_rank, ranks = _split_ranks(shape_id)
    for shape in shapes:
        if (shape.account, shape.id) == (owner, one_rank) and version in (None, VERSION):
            return _with_ranks(shape, ranks)
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


def shape_version(
    shape: Shape, *, model_context_length: int | None, accelerator: str = ACCELERATOR
) -> TrainingShapeVersion:
    """The resource. `model_context_length` is None when the model is not on this machine."""
    lengths = [n for n in (shape.max_context_length, model_context_length) if n is not None]
    model = _short(shape.base_model)
    return TrainingShapeVersion(
        name=shape.version_name,
        display_name=shape.id,
        description=_description(shape),
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
            accelerator_type=accelerator,
            accelerator_count=shape.ranks,
            min_total_accelerator_count=shape.ranks,
        ),
    )


def accelerators_named(shape: str) -> int | None:
    """How many a hosted shape's name counts, e.g. 8 in `…/qwen3-8b-128k-h200-x8`; None: it does not."""
    parts = _NAME.match(shape)
    hosted = _HOSTED.match(parts[2]) if parts else None
    counted = _HOSTED_COUNT.search(hosted["rest"] or "") if hosted else None
    return int(counted[1] or counted[2]) if counted else None


def _split_ranks(shape_id: str) -> tuple[str, int]:
    """`tiny-full-x2` -> `tiny-full` and 2."""
    parts = _RANKS.match(shape_id)
    return (parts["one"], int(parts["ranks"])) if parts else (shape_id, 1)


def _description(shape: Shape) -> str:
    ranks = f", divided among {shape.ranks} engine ranks" if shape.ranks > 1 else ""
    return f"{shape.mode} of {shape.base_model} on this machine{ranks}"


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
