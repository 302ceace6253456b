"""Which base models there are, and where their files lie.

    accounts/<a>/models/<m>   an alias, a promoted model, `tiny`, or a directory below a model root
    <org>/<name>              a Hugging Face repository that is in the local cache
    /a/directory              below a model root (aliases, which the operator gives, may be anywhere)

Nothing is ever downloaded here: a model that is not on this machine is an error that says how to
supply it.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from homefire.checkpoints import TINY_NAME, ensure_tiny
from homefire.control.db.rows import BaseModel, ModelRow
from homefire.wire.context_limit import ContextLimit, context_limit
from homefire.wire.errors import (
    FailedPrecondition,
    InvalidArgument,
    ModelUnavailable,
    UnknownModel,
    Unsupported,
)
from homefire.wire.ids import NAME
from homefire.wire.resources import BaseModelDetails, ModelKind, ModelState

ALIASES_FILE = "aliases.toml"
CONFIG_FILE = "config.json"
_RESOURCE = re.compile(r"^accounts/([^/]+)/models/([^/]+)$")
_REPOSITORY = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
_ALIAS_DEPTH = 8
_LONGEST_NAME = 512


class _TextConfig(msgspec.Struct, frozen=True):
    max_position_embeddings: int | None = None
    n_positions: int | None = None
    original_max_position_embeddings: int | None = None
    rope_parameters: dict[str, object] | None = None
    rope_scaling: dict[str, object] | None = None
    attn_temperature_tuning: bool | int | None = None
    floor_scale: float | None = None
    num_experts: int | None = None
    num_local_experts: int | None = None
    n_routed_experts: int | None = None
    vocab_size: int | None = None
    hidden_size: int | None = None
    num_hidden_layers: int | None = None
    intermediate_size: int | list[int] | None = None


class ModelConfig(_TextConfig, frozen=True):
    """What of a Hugging Face `config.json` matters here."""

    model_type: str = ""
    torch_dtype: str | None = None
    dtype: str | None = None
    text_config: _TextConfig | None = None

    @property
    def text(self) -> _TextConfig:
        return self.text_config or self

    @property
    def context_limit(self) -> ContextLimit:
        return context_limit(msgspec.structs.asdict(self.text))

    @property
    def is_moe(self) -> bool:
        text = self.text
        return any((text.num_experts, text.num_local_experts, text.n_routed_experts))


@dataclass(frozen=True)
class CatalogEntry:
    """A model that could be named, and what stands behind the name."""

    name: str
    """As a client may write it: `accounts/<a>/models/<m>`."""
    source: str
    """`built-in`, `alias of …`, `directory` or `promoted`."""


class Catalog:
    """Blocks on the disk; ask it in a thread. `promoted` is given anew with every question."""

    def __init__(
        self,
        *,
        account: str,
        models: Path,
        roots: Sequence[Path],
        aliases: Mapping[str, str],
    ) -> None:
        self._account = account
        self._models = models
        self._roots = [models, *roots]
        self._aliases = dict(aliases)

    def resolve(self, name: str, promoted: Sequence[ModelRow]) -> BaseModel:
        """UnknownModel says what is available, ModelUnavailable how to supply the files."""
        if not name or len(name) > _LONGEST_NAME or not name.isprintable():
            raise InvalidArgument(
                f"base model {name[:_LONGEST_NAME]!r} is not a name",
                hint="use accounts/<account>/models/<model>, a repository, or a directory",
                field="baseModel",
            )
        directory, tokenizer_id = self._locate(name, promoted)
        config = read_model_config(directory)
        return BaseModel(
            name=name,
            directory=str(directory),
            tokenizer_id=tokenizer_id or str(directory),
            max_context_length=config.context_limit.num_tokens,
            context_limit_reason=config.context_limit.reason,
        )

    def entries(self, promoted: Sequence[ModelRow]) -> list[CatalogEntry]:
        found = [CatalogEntry(self._resource(TINY_NAME), "built-in")]
        found += [CatalogEntry(name, f"alias of {to}") for name, to in self._aliases.items()]
        found += [
            CatalogEntry(f"accounts/{row.account}/models/{row.id}", "promoted")
            for row in promoted
            if row.state is ModelState.READY and row.kind is ModelKind.HF_BASE_MODEL
        ]
        known = {entry.name for entry in found}
        for directory in self._directories():
            name = self._resource(directory.name)
            if name not in known:
                known.add(name)
                found.append(CatalogEntry(name, "directory"))
        return found

    def promoted_directory(self, account: str, model: str) -> Path:
        return self._models / account / model

    def _locate(self, name: str, promoted: Sequence[ModelRow]) -> tuple[Path, str | None]:
        """The model's directory, and its tokenizer where that is not the directory."""
        target, trusted = self._follow_aliases(name)
        if (row := _promoted(target, promoted)) is not None:
            return self._promoted_model(row), None
        if (short := self._short_name(target)) is not None:
            if short == TINY_NAME:
                return ensure_tiny(self._models / TINY_NAME), None
            for root in self._roots:
                if _is_model(root / short):
                    return root / short, None
        if Path(target).is_absolute():
            return self._directory(Path(target), trusted=trusted, promoted=promoted), None
        if _REPOSITORY.match(target):
            return _cached_repository(target), target
        raise self._unknown(name, promoted)

    def _follow_aliases(self, name: str) -> tuple[str, bool]:
        """Where the name leads, and whether the operator said so."""
        target = name
        for _ in range(_ALIAS_DEPTH):
            following = self._aliases.get(target)
            if following is None:
                return target, target != name
            target = following
        raise InvalidArgument(f"the aliases of {name!r} lead in a circle", field="aliases")

    def _short_name(self, target: str) -> str | None:
        """The last part of a resource name, or a bare name; None for paths and repositories."""
        resource = _RESOURCE.match(target)
        short = resource[2] if resource else target
        return short if NAME.match(short) else None

    def _directory(self, path: Path, *, trusted: bool, promoted: Sequence[ModelRow]) -> Path:
        real = path.resolve()
        if not trusted and not any(real.is_relative_to(root.resolve()) for root in self._roots):
            raise UnknownModel(
                f"directory {str(path)!r} is not below a model root",
                hint="start `homefire up` with --model-root, or give it a name with --alias",
                field="baseModel",
            )
        if not _is_model(real):
            raise ModelUnavailable(
                f"{real} holds no model: it has no {CONFIG_FILE}",
                hint="a base model is an ordinary Hugging Face directory",
            )
        return real

    def _promoted_model(self, row: ModelRow) -> Path:
        name = f"accounts/{row.account}/models/{row.id}"
        if row.state is not ModelState.READY:
            raise FailedPrecondition(
                f"{name} is still being written", hint="wait for its promotion"
            )
        if row.kind is ModelKind.HF_PEFT_ADDON:
            raise Unsupported(
                f"{name} is an adapter, not a base model",
                hint=f"deploy {row.source.base_model.name} and hot load the snapshot itself",
            )
        return self.promoted_directory(row.account, row.id)

    def _directories(self) -> Iterator[Path]:
        for root in self._roots:
            if root.is_dir():
                yield from sorted(p.parent for p in root.glob(f"*/{CONFIG_FILE}"))

    def _resource(self, short: str) -> str:
        return f"accounts/{self._account}/models/{short}"

    def _unknown(self, name: str, promoted: Sequence[ModelRow]) -> UnknownModel:
        available = ", ".join(entry.name for entry in self.entries(promoted))
        return UnknownModel(
            f"base model {name!r} is unknown; available: {available}",
            hint=(
                f"start `homefire up` with --alias {name}=MODEL (tiny, a Hugging Face repository,"
                " or a directory), or put its directory below a model root"
            ),
            field="baseModel",
        )


def read_aliases(home: Path) -> dict[str, str]:
    """`aliases.toml` of the home: one `"<resource>" = "<model>"` a line. No file, no aliases."""
    path = home / ALIASES_FILE
    try:
        loaded = tomllib.loads(path.read_text())
        return msgspec.convert(loaded, dict[str, str])
    except FileNotFoundError:
        return {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as exc:
        raise InvalidArgument(
            f"{path} cannot be read: {exc}", hint='write lines such as "name" = "tiny"'
        ) from exc


def read_model_config(directory: Path) -> ModelConfig:
    path = directory / CONFIG_FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=ModelConfig)
    except OSError as exc:
        raise ModelUnavailable(f"{path} cannot be read: {exc}") from exc
    except msgspec.DecodeError as exc:
        raise ModelUnavailable(f"{path} is not a model's configuration: {exc}") from exc


def weights_size_bytes(directory: Path) -> int:
    """Bytes of all safetensors files."""
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def parameter_count(directory: Path, config: ModelConfig) -> int:
    bytes_each = 4 if (config.dtype or config.torch_dtype) == "float32" else 2
    return weights_size_bytes(directory) // bytes_each


def base_model_details(directory: Path) -> BaseModelDetails:
    config = read_model_config(directory)
    return BaseModelDetails(
        moe=config.is_moe,
        parameter_count=parameter_count(directory, config),
        model_type=config.model_type,
        max_context_length=config.context_limit.num_tokens,
    )


def _is_model(directory: Path) -> bool:
    try:
        return (directory / CONFIG_FILE).is_file()
    except OSError:
        return False


def _promoted(name: str, promoted: Sequence[ModelRow]) -> ModelRow | None:
    resource = _RESOURCE.match(name)
    if resource is None:
        return None
    return next((row for row in promoted if (row.account, row.id) == resource.groups()), None)


def _cached_repository(repository: str) -> Path:
    """The snapshot of a repository in the local Hugging Face cache."""
    try:
        from huggingface_hub import (
            snapshot_download,  # pyright: ignore[reportUnknownVariableType]
        )
        from huggingface_hub.errors import LocalEntryNotFoundError
    except ImportError as exc:
        raise ModelUnavailable(
            f"{repository!r} looks like a Hugging Face repository, but huggingface_hub is missing",
            hint="install homefire[engine], or give a directory below a model root",
        ) from exc
    try:
        found: str = snapshot_download(repository, local_files_only=True)
    except (LocalEntryNotFoundError, OSError, ValueError) as exc:
        raise _not_cached(repository) from exc
    directory = Path(found)
    if not _is_model(directory) or not weights_size_bytes(directory):
        raise _not_cached(repository)
    return directory


def _not_cached(repository: str) -> ModelUnavailable:
    return ModelUnavailable(
        f"base model {repository!r} is not in the local Hugging Face cache",
        hint=(
            f"run `hf download {repository}` on this machine, or copy its directory below a model"
            " root and name that"
        ),
        field="baseModel",
    )
