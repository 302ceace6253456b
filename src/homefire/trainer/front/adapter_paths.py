"""Where an `adapter_path` leads, and what lies there at this moment.

accounts/<a>/models/<id>                  a promoted adapter of the account
/a/directory                              a PEFT directory below a model root
step-2-4b50536f                           a sampler snapshot of the model's own slot
cross_job://job-3f9a1c2e/step-2-…         of a dedicated job of the account
tinker://ts-3f…:train:0/sampler_weights/s of a run of the root plane
"""

from __future__ import annotations

import re
from pathlib import Path

from homefire.checkpoints import CheckpointStore, read_adapter_directory
from homefire.trainer.front.checkpoint_paths import find_snapshot
from homefire.trainer.front.operations import LoadAdapterWeights
from homefire.wire.errors import (
    InvalidArgument,
    UnknownModel,
    Unsupported,
    WrongCheckpointKind,
)
from homefire.wire.ids import check_name
from homefire.wire.manifest import CheckpointKind
from homefire.wire.specs import TrainerSpec

_PROMOTED = re.compile(r"^accounts/([^/]+)/models/([^/]+)$")
_SCHEMES = ("cross_job://", "tinker://")
_FIELD = "adapter_path"


def resolve_adapter(
    path: str, *, store: CheckpointStore, spec: TrainerSpec, slot: str
) -> LoadAdapterWeights:
    """The operation that loads what lies there now, and nothing else. Blocks on the disk."""
    directory, base_model = _locate(path, store, spec, slot)
    adapter = read_adapter_directory(directory)
    named = base_model if base_model is not None else adapter.config.base_model_name_or_path
    if not Path(path).is_absolute():
        _check_base_model(named, spec, path)
    return LoadAdapterWeights(path, str(directory), adapter.digest)


def _locate(
    path: str, store: CheckpointStore, spec: TrainerSpec, slot: str
) -> tuple[Path, str | None]:
    """The directory, and the base model where a manifest says it."""
    if promoted := _PROMOTED.match(path):
        return _promoted_directory(promoted[1], promoted[2], spec), None
    if Path(path).is_absolute():
        return _below_a_root(Path(path), spec), None
    if "://" in path and not path.startswith(_SCHEMES):
        raise Unsupported(
            f"adapter_path {path!r}: adapters are not fetched from other hosts",
            hint="give a promoted model, a directory below a model root, or a snapshot",
            field=_FIELD,
        )
    key = find_snapshot(store, path, spec=spec, slot=slot)
    manifest = store.manifest(key)
    if manifest.kind is not CheckpointKind.LORA:
        raise _no_adapter(path, f"a {manifest.kind} snapshot")
    return store.directory(key), manifest.base_model


def _promoted_directory(account: str, model: str, spec: TrainerSpec) -> Path:
    """Another account's models do not exist for this one."""
    directory = Path(spec.promoted_models) / spec.account / check_name(model, field=_FIELD)
    if account != spec.account or not spec.promoted_models or not directory.is_dir():
        raise UnknownModel(
            f"there is no promoted model accounts/{account}/models/{model}",
            hint="promote an adapter snapshot first",
            field=_FIELD,
        )
    if (directory / "config.json").is_file():
        raise _no_adapter(f"accounts/{account}/models/{model}", "a base model")
    return directory


def _below_a_root(path: Path, spec: TrainerSpec) -> Path:
    real = path.resolve()
    if not any(real.is_relative_to(Path(root).resolve()) for root in spec.model_roots):
        raise InvalidArgument(
            f"directory {str(path)!r} is not below a model root",
            hint="start `homefire up` with --model-root",
            field=_FIELD,
        )
    return real


def _no_adapter(path: str, what: str) -> WrongCheckpointKind:
    return WrongCheckpointKind(
        f"{path!r} is {what}, not an adapter", hint="give an adapter's name", field=_FIELD
    )


def _check_base_model(found: str | None, spec: TrainerSpec, path: str) -> None:
    """One model has several names here; the last part of a name is what they share."""
    known = {_stem(name) for name in (spec.base_model, spec.tokenizer_id, spec.model_dir)}
    if found and _stem(found) not in known:
        raise InvalidArgument(
            f"{path!r} is an adapter of {found}, this model's base is {spec.base_model}",
            hint=f"load it into a model of {found}",
            field=_FIELD,
        )


def _stem(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].lower()
