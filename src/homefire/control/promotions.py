"""Promotion: a sampler snapshot becomes a model resource.

A worker process writes the files. The row in UPLOADING is all that is needed to go on after a restart:
the worker is found again, or started again, and finishes what is there.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import sqlite3
from pathlib import Path

import msgspec

from homefire.checkpoints import CheckpointKey, CheckpointStore, PromoteResult, PromoteSpec
from homefire.checkpoints.progress import Progress, read_progress
from homefire.control.capacity import threads_per_engine
from homefire.control.catalog import Catalog
from homefire.control.db import tables
from homefire.control.db.database import Database
from homefire.control.db.rows import BaseModel, ModelRow, OperationRow, PromotionSource
from homefire.control.jobs import find_job
from homefire.control.names import id_in
from homefire.foundation.clock import Clock
from homefire.foundation.home import Home
from homefire.launch import Launcher, ProcessRecord, ProcessSpec
from homefire.wire.errors import (
    AlreadyExists,
    ErrorRecord,
    HomefireError,
    InternalError,
    InvalidArgument,
    Unavailable,
    WrongCheckpointKind,
    from_code,
)
from homefire.wire.ids import POLICY_SLOT, check_name, model_name
from homefire.wire.manifest import CheckpointFamily, CheckpointKind, Manifest
from homefire.wire.resources import ModelKind, ModelState, PromoteRequest

log = logging.getLogger(__name__)
_MODEL_ID = re.compile(r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")
_WORKER_GRACE_S = 5.0
_TAIL_LINES = 12


class Promotions:
    """One task per promotion in progress; `wait` lets any number of callers see its end."""

    def __init__(
        self,
        *,
        database: Database,
        store: CheckpointStore,
        catalog: Catalog,
        launcher: Launcher,
        home: Home,
        clock: Clock,
    ) -> None:
        self._database = database
        self._store = store
        self._catalog = catalog
        self._launcher = launcher
        self._home = home
        self._directory = home.run / "promotions"
        self._clock = clock
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._starting = asyncio.Lock()
        """Held from the start of a worker until it is written down: no stop comes between."""
        self._stopping = False

    async def begin(self, account: str, checkpoint: str, request: PromoteRequest) -> OperationRow:
        """The operation of a new promotion, or of the same one asked for before."""
        if self._stopping:
            raise Unavailable("control is stopping", hint="promote again when it is up")
        check_name(checkpoint, field="checkpoint")
        model_id = _model_id(request.output_model, account)
        source = await self._source(account, checkpoint, request)
        operation = await self._database.transact(
            lambda c: self._insert(c, account, model_id, source)
        )
        if not operation.done:
            self._ensure_running(operation)
        return operation

    async def wait(self, operation: OperationRow, *, within_s: float | None = None) -> OperationRow:
        """The operation when it is done, or as it is then; its worker runs on if the caller goes away."""
        task = self._tasks.get(operation.name)
        if task is not None:
            await asyncio.wait([task], timeout=within_s)
        return await self.operation(operation.account, operation.name) or operation

    async def operation(self, account: str, name: str) -> OperationRow | None:
        row = await self._database.transact(lambda c: tables.operation(c, name))
        return row if row is not None and row.account == account else None

    async def progress(self, model: ModelRow) -> Progress | None:
        """How far the worker of a model in UPLOADING is."""
        return await asyncio.to_thread(read_progress, self._progress_file(model))

    async def resume(self) -> None:
        """Goes on with every promotion that an earlier control plane began."""
        for model in await self._database.transact(tables.models):
            if model.state is ModelState.UPLOADING:
                name = model.operation
                operation = await self._database.transact(lambda c, n=name: tables.operation(c, n))
                if operation is not None:
                    self._ensure_running(operation)

    async def close(self) -> None:
        """Follows no promotion any more; the workers run on."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def stop(self) -> None:
        """Ends the workers; the rows stay in UPLOADING, and the next start goes on."""
        self._stopping = True
        async with self._starting:
            await self.close()
        models = await self._database.transact(tables.models)
        workers = [model.worker for model in models if model.worker is not None]
        await asyncio.gather(
            *(self._launcher.stop(worker, grace_s=_WORKER_GRACE_S) for worker in workers)
        )

    async def _source(
        self, account: str, checkpoint: str, request: PromoteRequest
    ) -> PromotionSource:
        job_id = id_in(
            request.trainer_job_id,
            collection="rlorTrainerJobs",
            account=account,
            field="trainer_job_id",
        )
        job = await self._database.transact(lambda c: find_job(c, account, job_id))
        if request.base_model:
            await self._check_base_model(request.base_model, job.config.base_model)
        await asyncio.to_thread(self._check_promotable, account, job_id, checkpoint)
        return PromotionSource(job=job_id, checkpoint=checkpoint, base_model=job.config.base_model)

    async def _check_base_model(self, asked: str, trained: BaseModel) -> None:
        """A model card that names another base model than the trainer's would be a lie."""
        if asked == trained.name:
            return
        promoted = await self._database.transact(tables.models)
        found = await asyncio.to_thread(self._catalog.resolve, asked, promoted)
        if found.directory != trained.directory:
            raise InvalidArgument(
                f"base_model {asked} is not {trained.name}, which the job trained",
                hint="give the trainer's base model, or leave it out",
                field="base_model",
            )

    def _check_promotable(self, account: str, job_id: str, checkpoint: str) -> Manifest:
        def key(family: CheckpointFamily) -> CheckpointKey:
            return CheckpointKey(account, job_id, POLICY_SLOT, family, checkpoint)

        sampler = key(CheckpointFamily.SAMPLER)
        if not self._store.exists(sampler) and self._store.exists(key(CheckpointFamily.STATE)):
            raise WrongCheckpointKind(
                f"checkpoint {checkpoint!r} is a train state, which cannot be promoted",
                hint="save it with save_weights_for_sampler and promote that",
                field="checkpoint",
            )
        return self._store.loadable(sampler)

    def _insert(
        self, connection: sqlite3.Connection, account: str, model_id: str, source: PromotionSource
    ) -> OperationRow:
        existing = tables.model(connection, account, model_id)
        if existing is not None:
            return _same_promotion(connection, existing, source)
        now = self._clock.now()
        operation = OperationRow(
            name=f"accounts/{account}/operations/promote-{secrets.token_hex(6)}",
            account=account,
            done=False,
            error_code="",
            error="",
            model=model_id,
            created_at=now,
        )
        model = ModelRow(
            account=account,
            id=model_id,
            state=ModelState.UPLOADING,
            kind=ModelKind.HF_BASE_MODEL,
            source=source,
            operation=operation.name,
            worker=None,
            digest="",
            created_at=now,
        )
        tables.insert_operation(connection, operation)
        tables.insert_model(connection, model)
        return operation

    def _ensure_running(self, operation: OperationRow) -> None:
        known = self._tasks.get(operation.name)
        if known is None or known.done():
            task = asyncio.create_task(self._promote(operation))
            self._tasks[operation.name] = task
            task.add_done_callback(lambda _: self._tasks.pop(operation.name, None))

    async def _promote(self, operation: OperationRow) -> None:
        account, model_id = operation.account, operation.model
        model = await self._database.transact(lambda c: tables.model(c, account, model_id))
        if model is None or model.state is not ModelState.UPLOADING:
            return
        try:
            result = await self._work(model)
        except HomefireError as exc:
            await self._fail(model, exc)
            return
        if not result.ok:
            error = result.error or ErrorRecord.of(InternalError("the worker gave no reason"))
            await self._fail(model, error.exception())
            return
        await self._finish(model, result)

    async def _work(self, model: ModelRow) -> PromoteResult:
        result_file = self._directory / f"{_stem(model)}.result.json"
        record = None if model.worker is None else await self._launcher.find(model.worker)
        if record is None:
            if model.worker is not None and result_file.exists():
                return _read_result(result_file)
            record = await self._start(model, result_file)
        exit_ = await self._launcher.wait(record)
        try:
            return await asyncio.to_thread(_read_result, result_file)
        except (OSError, msgspec.DecodeError) as exc:
            tail = "\n".join(await self._launcher.logs(record, lines=_TAIL_LINES))
            raise InternalError(
                f"the worker that promotes {model.id!r} {exit_} without a result", hint=tail
            ) from exc

    async def _start(self, model: ModelRow, result_file: Path) -> ProcessRecord:
        """Starts the model's worker. A result that is there afterwards is this worker's."""
        spec = self._worker_spec(model, result_file)
        async with self._starting:
            await asyncio.to_thread(result_file.unlink, missing_ok=True)
            await asyncio.to_thread(self._progress_file(model).unlink, missing_ok=True)
            await self._remember(model, spec.record(process=None, boot="", started_at=0.0))
            record = await self._launcher.start(spec)
            await self._remember(model, record)
        return record

    def _progress_file(self, model: ModelRow) -> Path:
        return self._directory / f"{_stem(model)}.progress.json"

    async def _remember(self, model: ModelRow, record: ProcessRecord) -> None:
        await self._database.transact(lambda c: tables.set_worker(c, model, record))

    def _worker_spec(self, model: ModelRow, result_file: Path) -> ProcessSpec:
        destination = self._catalog.promoted_directory(model.account, model.id)
        spec = PromoteSpec(
            store_root=self._home.store_root,
            account=model.account,
            job=model.source.job,
            slot=POLICY_SLOT,
            identity=model.source.checkpoint,
            base_model_dir=model.source.base_model.directory,
            destination=str(destination),
            result_file=str(result_file),
            progress_file=str(self._progress_file(model)),
        )
        return ProcessSpec(
            name=f"promotion {model.id}",
            module="homefire.checkpoints",
            arguments=("promote",),
            spec_file=str(self._directory / f"{_stem(model)}.spec.json"),
            spec=msgspec.json.encode(spec),
            log_file=str(self._directory / f"{_stem(model)}.log"),
            threads=threads_per_engine(),
            nonce=secrets.token_hex(16),
        )

    async def _finish(self, model: ModelRow, result: PromoteResult) -> None:
        is_adapter = result.kind is CheckpointKind.LORA
        kind = ModelKind.HF_PEFT_ADDON if is_adapter else ModelKind.HF_BASE_MODEL

        def work(connection: sqlite3.Connection) -> None:
            tables.finish_model(connection, model, kind, result.digest)
            tables.finish_operation(connection, model.operation)

        await self._database.transact(work)

    async def _fail(self, model: ModelRow, error: HomefireError) -> None:
        log.warning("promotion of %s failed: %s", model.id, error)

        def work(connection: sqlite3.Connection) -> None:
            tables.remove_model(connection, model.account, model.id)
            tables.finish_operation(
                connection, model.operation, error_code=error.code, error=str(error)
            )

        await self._database.transact(work)


def operation_error(operation: OperationRow) -> HomefireError | None:
    """What a caller that waited for the operation gets to see."""
    return from_code(operation.error_code, operation.error) if operation.error else None


def _stem(model: ModelRow) -> str:
    return f"{model.account}-{model.id}"


def _read_result(path: Path) -> PromoteResult:
    return msgspec.json.decode(path.read_bytes(), type=PromoteResult)


def _model_id(output_model: str, account: str) -> str:
    model_id = id_in(output_model, collection="models", account=account, field="output_model")
    if not _MODEL_ID.match(model_id):
        raise InvalidArgument(
            f"output_model {model_id!r} is not a valid model id",
            hint="use 1 to 63 of [a-z0-9-], without '-' at the ends",
            field="output_model",
        )
    return model_id


def _same_promotion(
    connection: sqlite3.Connection, existing: ModelRow, source: PromotionSource
) -> OperationRow:
    """Clients repeat a promotion whose answer they lost; another one may not take the name."""
    asked, found = (
        (source.job, source.checkpoint),
        (existing.source.job, existing.source.checkpoint),
    )
    operation = tables.operation(connection, existing.operation)
    if asked != found or operation is None:
        name = model_name(existing.account, existing.id)
        raise AlreadyExists(
            f"{name} exists: it was promoted from checkpoint {found[1]!r} of job {found[0]!r}",
            hint="choose another output_model, or delete that model first",
            field="output_model",
        )
    return operation
