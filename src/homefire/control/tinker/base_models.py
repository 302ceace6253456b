"""What the names of base models resolve to on the root plane, and which names it offers."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

import msgspec

from homefire.control.catalog import Catalog
from homefire.control.db import tables
from homefire.control.db.database import Database
from homefire.control.db.rows import BaseModel
from homefire.control.models import Models
from homefire.wire.errors import HomefireError, InvalidArgument
from homefire.wire.resources import ModelKind, ModelState
from homefire.wire.tinker_root import SupportedModel


@dataclass(frozen=True)
class BaseModels:
    database: Database
    catalog: Catalog
    models: Models

    async def resolve(self, name: str) -> BaseModel:
        """One directory for all names of one model. UnknownModel says what is available."""
        promoted = await self.database.transact(tables.models)
        try:
            model = await asyncio.to_thread(self.catalog.resolve, name, promoted)
        except HomefireError as error:
            error.field = "base_model"
            raise
        directory = await asyncio.to_thread(Path(model.directory).resolve)
        return msgspec.structs.replace(model, directory=str(directory))

    async def check_same(self, named: str, model: BaseModel, *, because: str) -> None:
        """`named` has to be another name of `model`."""
        if (await self.resolve(named)).directory != model.directory:
            raise InvalidArgument(
                f"base_model {named!r} is not {model.name}, which {because} is of",
                hint="leave base_model out, or name the same model",
                field="base_model",
            )

    async def supported(self) -> list[SupportedModel]:
        """The catalog, as far as its files can be reached."""
        return [
            SupportedModel(model.name, model.base_model_details.max_context_length)
            for model in await self.models.list()
            if model.kind is ModelKind.HF_BASE_MODEL
            and model.state is ModelState.READY
            and model.base_model_details is not None
        ]
