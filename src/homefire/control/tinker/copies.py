"""Copies of checkpoints: into another session's run, or into a project as a run of their own.

A copy shares its bytes with the source and outlives it. Its run holds the copy and is not trained on.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import sqlite3
from dataclasses import dataclass

from homefire.checkpoints import CheckpointKey, CheckpointStore, check_stands_alone
from homefire.control.db import tinker_tables
from homefire.control.db.database import Database
from homefire.control.db.rows import TinkerRunRow, TinkerSessionRow
from homefire.control.tinker.checkpoints import Checkpoints
from homefire.control.tinker.runs import find_run
from homefire.control.tinker.sessions import find_session
from homefire.foundation.clock import Clock
from homefire.wire.checkpoint_paths import CheckpointPath, parse_checkpoint_path
from homefire.wire.errors import FailedPrecondition, InvalidArgument, Unsupported
from homefire.wire.ids import model_id
from homefire.wire.manifest import CheckpointFamily
from homefire.wire.pooled import SESSION_PREFIX
from homefire.wire.tinker_rest import CopyWeightsRequest

_COPIED_FROM = "homefire.copied_from"


@dataclass(frozen=True)
class Copies:
    database: Database
    store: CheckpointStore
    checkpoints: Checkpoints
    clock: Clock

    async def copy(
        self, account: str, request: CopyWeightsRequest, *, idempotency_key: str
    ) -> CheckpointPath:
        """The copy's path. The same request again gives the same copy: clients repeat it when they
        lost the answer, under one `idempotency_key`."""
        source = parse_checkpoint_path(request.source_path, field="source_path")
        _check_request(request, source)
        manifest = await self.checkpoints.get(account, source)
        check_stands_alone(manifest)
        expires_at = self.checkpoints.expiry(request.ttl_seconds)
        now = self.clock.now()
        run = await self.database.transact(
            lambda c: self._run(c, account, request, source, idempotency_key, now=now)
        )
        key = CheckpointKey.of(manifest)
        to = CheckpointKey(account, run.job, run.id, key.family, key.name)

        def work() -> None:
            if not self.store.exists(to):
                self.store.copy(key, to, expires_at=expires_at)

        await asyncio.to_thread(work)
        return CheckpointPath(run.id, source.family, source.name)

    def _run(
        self,
        connection: sqlite3.Connection,
        account: str,
        request: CopyWeightsRequest,
        source: CheckpointPath,
        idempotency_key: str,
        *,
        now: float,
    ) -> TinkerRunRow:
        original = find_run(connection, account, source.run)
        session, seq_id = self._destination(connection, account, request, idempotency_key, now=now)
        run_id = model_id(session, seq_id)
        known = tinker_tables.run(connection, run_id)
        if known is not None:
            return _same_copy(known, source)
        run = TinkerRunRow(
            id=run_id,
            account=account,
            session=session,
            model_seq_id=seq_id,
            job=original.job,
            base_model=original.base_model,
            lora_rank=original.lora_rank,
            user_metadata={**original.user_metadata, _COPIED_FROM: str(source)},
            source_path=str(source),
            created_at=now,
            last_request_at=now,
        )
        tinker_tables.insert_run(connection, run)
        return run

    def _destination(
        self,
        connection: sqlite3.Connection,
        account: str,
        request: CopyWeightsRequest,
        idempotency_key: str,
        *,
        now: float,
    ) -> tuple[str, int]:
        """A session and the number of a model in it."""
        if request.session_id is not None and request.model_seq_id is not None:
            session = find_session(connection, account, request.session_id)
            return session.id, request.model_seq_id
        session_id = _session_id(account, idempotency_key)
        if tinker_tables.session(connection, session_id) is not None:
            return session_id, 0
        session = TinkerSessionRow(
            id=session_id,
            account=account,
            display_name=f"copy of {request.source_path}",
            project_id=request.destination_project_id,
            created_at=now,
            heartbeat_at=now,
        )
        tinker_tables.insert_session(connection, session)
        tinker_tables.finish_session(
            connection, session.id, reason="success", detail="holds a copy", now=now
        )
        return session.id, 0


def _session_id(account: str, idempotency_key: str) -> str:
    if not idempotency_key:
        return f"{SESSION_PREFIX}{secrets.token_hex(8)}"
    named = hashlib.sha256(f"{account}\0{idempotency_key}".encode()).hexdigest()
    return f"{SESSION_PREFIX}{named[:16]}"


def _check_request(request: CopyWeightsRequest, source: CheckpointPath) -> None:
    if request.weights_access_token is not None:
        raise Unsupported(
            "copying with a weights_access_token is not supported: there is one account",
            hint="leave the token out",
            field="weights_access_token",
        )
    if source.family is CheckpointFamily.EXTERNAL:
        raise Unsupported(
            f"{source} holds external weights, which are for downloading",
            hint="copy the training state or the sampler weights",
            field="source_path",
        )
    to_session = request.session_id is not None and request.model_seq_id is not None
    if to_session == (request.destination_project_id is not None) or (
        not to_session and (request.session_id is not None or request.model_seq_id is not None)
    ):
        raise InvalidArgument(
            "copy_weights needs one destination",
            hint="give destination_project_id, or both session_id and model_seq_id",
            field="destination_project_id",
        )
    if request.model_seq_id is not None and request.model_seq_id < 0:
        raise InvalidArgument("model_seq_id is negative", field="model_seq_id")


def _same_copy(run: TinkerRunRow, source: CheckpointPath) -> TinkerRunRow:
    """A request that is repeated finds the copy; a model that trains is never written over."""
    if run.user_metadata.get(_COPIED_FROM) != str(source):
        raise FailedPrecondition(
            f"training run {run.id} exists and is no copy of {source}",
            hint="use another model_seq_id",
            field="model_seq_id",
        )
    return run
