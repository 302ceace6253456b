"""Model resources: what can be trained or served, and what was promoted."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from homefire.checkpoints.manifest_file import read_manifest
from homefire.control.capacity import num_cores
from homefire.control.catalog import Catalog, base_model_details
from homefire.control.db import tables
from homefire.control.db.database import Database
from homefire.control.db.rows import ModelRow
from homefire.control.lifecycle import DEPLOYMENT_LIVE, JOB_ENDED
from homefire.control.presentation import base_model_resource, model_resource
from homefire.control.shapes import Shape, find_shape, generated_shapes, shape_version
from homefire.wire.errors import (
    FailedPrecondition,
    HomefireError,
    ModelUnavailable,
    NotFound,
    StorageFailed,
    UnknownModel,
)
from homefire.wire.ids import model_name
from homefire.wire.manifest import Manifest
from homefire.wire.resources import Model, ModelKind, ModelState, PeftDetails, TrainingShapeVersion
from homefire.wire.specs import Accelerator

_ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Models:
    database: Database
    catalog: Catalog
    account: str
    """Whose training shapes are generated."""
    accelerator: Accelerator = Accelerator.CPU
    """That of their jobs."""

    async def list(self) -> list[Model]:
        """The catalog and every promoted model; what cannot be reached is left out."""
        promoted = await self.database.transact(tables.models)
        return await asyncio.to_thread(self._list, promoted)

    async def get(self, name: str) -> Model:
        """NotFound says what is available."""
        promoted = await self.database.transact(tables.models)
        return await asyncio.to_thread(self._get, name, promoted)

    async def promoted(self, model: ModelRow) -> Model:
        return await asyncio.to_thread(self._promoted, model)

    async def delete(self, account: str, model_id: str) -> None:
        """Removes a promoted model and its files; one that is in use, or was not promoted, stays."""

        def work(connection: sqlite3.Connection) -> bool:
            model = tables.model(connection, account, model_id)
            if model is None:
                return False
            _check_unused(connection, model, self.catalog.promoted_directory(account, model_id))
            tables.remove_model(connection, account, model_id)
            return True

        if not await self.database.transact(work):
            await self.get(model_name(account, model_id))
            raise FailedPrecondition(
                f"{model_name(account, model_id)} was not promoted here, so it cannot be deleted",
                hint="remove its alias or its directory",
            )
        await asyncio.to_thread(_remove_tree, self.catalog.promoted_directory(account, model_id))

    async def shapes(self) -> list[TrainingShapeVersion]:
        """The latest version of every generated shape whose model can be reached."""
        promoted = await self.database.transact(tables.models)
        return await asyncio.to_thread(self._shapes, promoted)

    async def shape(self, name: str) -> TrainingShapeVersion:
        """UnknownShape says what there is."""
        promoted = await self.database.transact(tables.models)
        return await asyncio.to_thread(self._shape, name, promoted)

    def _list(self, promoted: list[ModelRow]) -> list[Model]:
        models = [self._promoted(row) for row in promoted]
        named = {model.name for model in models}
        for entry in self.catalog.entries(promoted):
            if entry.name not in named and (model := self._found(entry.name, promoted)):
                source = model.source if model.source == "imported" else entry.source
                models.append(msgspec.structs.replace(model, source=source))
        return models

    def _get(self, name: str, promoted: list[ModelRow]) -> Model:
        for row in promoted:
            if model_name(row.account, row.id) == name:
                return self._promoted(row)
        sources = {entry.name: entry.source for entry in self.catalog.entries(promoted)}
        try:
            found = self.catalog.resolve(name, promoted)
        except UnknownModel as exc:
            raise NotFound(exc.message, hint=exc.hint) from exc
        details = base_model_details(Path(found.directory))
        if (manifest := _import_manifest(Path(found.directory))) is not None:
            return base_model_resource(found, "imported", details, digest=manifest.digest)
        return base_model_resource(found, sources.get(name, "huggingface"), details)

    def _found(self, name: str, promoted: list[ModelRow]) -> Model | None:
        try:
            return self._get(name, promoted)
        except HomefireError:
            return None

    def _promoted(self, row: ModelRow) -> Model:
        directory = self.catalog.promoted_directory(row.account, row.id)
        if row.state is not ModelState.READY:
            return model_resource(row, details=None, peft=None)
        if row.kind is ModelKind.HF_PEFT_ADDON:
            return model_resource(row, details=None, peft=_peft_details(directory, row))
        return model_resource(row, details=base_model_details(directory), peft=None)

    def _shapes(self, promoted: list[ModelRow]) -> list[TrainingShapeVersion]:
        shapes = generated_shapes(
            self.account, self.catalog.entries(promoted), max_ranks=num_cores()
        )
        unique = {shape.name: shape for shape in reversed(shapes)}
        versions = [self._version(shape, promoted) for shape in reversed(unique.values())]
        return [version for version in versions if version.snapshot.max_supported_context_length]

    def _shape(self, name: str, promoted: list[ModelRow]) -> TrainingShapeVersion:
        shape = find_shape(name, self.account, self.catalog.entries(promoted))
        return self._version(shape, promoted)

    def _version(self, shape: Shape, promoted: list[ModelRow]) -> TrainingShapeVersion:
        try:
            length = self.catalog.resolve(shape.base_model, promoted).max_context_length
        except (UnknownModel, ModelUnavailable):
            length = None
        return shape_version(shape, model_context_length=length, accelerator=self.accelerator.name)


def _import_manifest(directory: Path) -> Manifest | None:
    """None for what was not imported, or whose manifest is damaged."""
    try:
        return read_manifest(directory)
    except (OSError, HomefireError):
        return None


def _check_unused(connection: sqlite3.Connection, model: ModelRow, directory: Path) -> None:
    if model.state is not ModelState.READY:
        raise FailedPrecondition(f"model {model.id!r} is still being written")
    users = [
        f"job {job.id}"
        for job in tables.jobs(connection)
        if job.config.base_model.directory == str(directory) and job.state not in JOB_ENDED
    ]
    users += [
        f"deployment {row.id}"
        for row in tables.deployments(connection)
        if row.config.base_model.directory == str(directory) and row.state in DEPLOYMENT_LIVE
    ]
    if users:
        raise FailedPrecondition(
            f"model {model.id!r} is used by {', '.join(users)}", hint="delete those first"
        )


def _peft_details(directory: Path, row: ModelRow) -> PeftDetails:
    config = msgspec.json.decode((directory / _ADAPTER_CONFIG).read_bytes(), type=dict[str, Any])
    modules: list[str] | str | None = config.get("target_modules")
    return PeftDetails(
        base_model=row.source.base_model.name,
        r=int(config.get("r") or 0),
        target_modules=sorted(modules) if isinstance(modules, list) else [],
    )


def _remove_tree(directory: Path) -> None:
    try:
        shutil.rmtree(directory)
    except FileNotFoundError:
        return
    except OSError as exc:
        raise StorageFailed(f"{directory} could not be removed: {exc}") from exc
