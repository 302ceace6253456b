"""Retention of a job's checkpoints: the policy is the job's, the decision pure, a worker acts on it."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from homefire.checkpoints import (
    CheckpointKey,
    CheckpointStore,
    Doomed,
    RemovalResult,
    RemovalSpec,
    Verdict,
    decide,
    in_order_of_deletion,
)
from homefire.control.checkpoint_deletion import CheckpointDeletion
from homefire.control.db import tables
from homefire.control.db.database import Database
from homefire.control.db.rows import JobRow
from homefire.control.jobs import find_job
from homefire.control.presentation import evaluation_resource
from homefire.foundation.clock import Clock
from homefire.foundation.home import Home
from homefire.launch import Launcher, ProcessSpec
from homefire.wire.errors import HomefireError, InternalError
from homefire.wire.manifest import Manifest
from homefire.wire.resources import JobState
from homefire.wire.retention import PrunedRow, PruneReport, RetentionPolicy

log = logging.getLogger(__name__)
PRUNE_EVERY_S = 300.0
_GRACE_S = 5.0
_TAIL_LINES = 12
_NOTHING = RetentionPolicy(keep_last=0)
"""What is left to a tombstone at its end: what something rests on, and nothing else."""


@dataclass(frozen=True)
class Retention:
    """Blocks no loop; any number of prunings may be asked for, one runs at a time."""

    database: Database
    store: CheckpointStore
    store_root: str
    deletion: CheckpointDeletion
    launcher: Launcher
    home: Home
    clock: Clock
    tombstone_s: float
    """How long a deleted job's checkpoints stay."""
    going: set[CheckpointKey]
    """What is being deleted: nobody may begin to serve it."""
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def set_policy(self, job: JobRow, policy: RetentionPolicy) -> JobRow:
        """The job as it now is. InvalidArgument names a rule that makes no sense."""
        policy.check()

        def work(connection: tables.Connection) -> JobRow:
            config = find_job(connection, job.account, job.id).config
            changed = msgspec.structs.replace(config, retention=policy)
            tables.configure_job(connection, job.id, changed)
            return find_job(connection, job.account, job.id)

        return await self.database.transact(work)

    async def prune(
        self, job: JobRow, *, policy: RetentionPolicy | None = None, dry_run: bool = False
    ) -> PruneReport:
        """What stays and what goes, with the reasons; unless `dry_run`, what goes is gone."""
        applied = self._policy(job) if policy is None else policy.check(field="policy")
        async with self._turn:
            verdicts = await self._decide(job, applied)
            spared: dict[str, str] = {}
            if not dry_run and not all(verdict.keep for verdict in verdicts):
                verdicts, spared = await self._act(job, applied, verdicts)
        return _report(applied, verdicts, spared, dry_run=dry_run)

    async def apply_policies(self) -> None:
        """Prunes every job whose policy has rules, or whose time as a tombstone is over."""
        for job in await self.database.transact(tables.jobs):
            if self._policy(job).is_empty:
                continue
            try:
                report = await self.prune(job)
            except (HomefireError, OSError) as exc:
                log.warning("checkpoints of %s could not be pruned: %s", job.id, exc)
                continue
            for row in report.checkpoints:
                if not row.keep:
                    log.info("%s/%s was pruned: %s", job.id, row.checkpoint, row.why[0])

    async def apply_for_ever(self) -> None:
        """A background task. At first it waits: who samples has to be heard of since control started."""
        while True:
            await asyncio.sleep(PRUNE_EVERY_S)
            await self.apply_policies()

    def _policy(self, job: JobRow) -> RetentionPolicy:
        return _NOTHING if self._is_over(job) else job.config.retention

    def _is_over(self, job: JobRow) -> bool:
        is_tombstone = job.state is JobState.DELETED and not job.config.pooled
        return is_tombstone and self.clock.now() - job.updated_at >= self.tombstone_s

    async def _decide(self, job: JobRow, policy: RetentionPolicy) -> list[Verdict]:
        needs = await self.deletion.needs()
        rows = await self.database.transact(lambda c: tables.evaluations(c, job.account))
        checkpoints = await asyncio.to_thread(self.store.list, job.account, job.id)
        return decide(
            checkpoints,
            policy,
            now=self.clock.now(),
            needed=needs.need,
            evaluations=[evaluation_resource(row) for row in rows],
            is_live=job.state is not JobState.DELETED,
        )

    async def _act(
        self, job: JobRow, policy: RetentionPolicy, verdicts: Sequence[Verdict]
    ) -> tuple[list[Verdict], dict[str, str]]:
        """Decides once more behind a barrier: what began to be served since the first decision stays,
        and what is still to go cannot be served any more."""
        self.going.update(CheckpointKey.of(m) for m in in_order_of_deletion(verdicts))
        try:
            barred = frozenset(self.going)
            again = await self._decide(job, policy)
            going = [m for m in in_order_of_deletion(again) if CheckpointKey.of(m) in barred]
            return again, await self._remove(job, going)
        finally:
            self.going.clear()

    async def _remove(self, job: JobRow, going: Sequence[Manifest]) -> dict[str, str]:
        """Why what was to go stays after all, by key."""
        if not going:
            return {}
        directory = self.home.run / "retention"
        result_file = directory / f"{job.id}.result.json"
        await asyncio.to_thread(result_file.unlink, missing_ok=True)
        result = await self._work(self._worker(job, going, directory, result_file), result_file)
        if result.error is not None:
            raise result.error.exception()
        return result.spared

    async def _work(self, spec: ProcessSpec, result_file: Path) -> RemovalResult:
        record = await self.launcher.start(spec)
        try:
            exit_ = await self.launcher.wait(record)
        except asyncio.CancelledError:
            await asyncio.shield(self.launcher.stop(record, grace_s=_GRACE_S))
            raise
        try:
            data = await asyncio.to_thread(result_file.read_bytes)
            return msgspec.json.decode(data, type=RemovalResult)
        except (OSError, msgspec.DecodeError) as exc:
            tail = "\n".join(await self.launcher.logs(record, lines=_TAIL_LINES))
            raise InternalError(f"{spec.name} {exit_} without a result", hint=tail) from exc

    def _worker(
        self, job: JobRow, going: Sequence[Manifest], directory: Path, result_file: Path
    ) -> ProcessSpec:
        spec = RemovalSpec(
            store_root=self.store_root,
            doomed=[Doomed(CheckpointKey.of(m), m.digest) for m in going],
            result_file=str(result_file),
        )
        return ProcessSpec(
            name=f"retention {job.id}",
            module="homefire.checkpoints",
            arguments=("remove",),
            spec_file=str(directory / f"{job.id}.spec.json"),
            spec=msgspec.json.encode(spec),
            log_file=str(directory / f"{job.id}.log"),
            threads=1,
            nonce=secrets.token_hex(16),
        )


def _report(
    policy: RetentionPolicy, verdicts: Sequence[Verdict], spared: dict[str, str], *, dry_run: bool
) -> PruneReport:
    rows = [
        _row(verdict, spared.get(str(CheckpointKey.of(verdict.manifest)))) for verdict in verdicts
    ]
    freed = sum(row.size_bytes for row in rows if not row.keep)
    return PruneReport(policy=policy, dry_run=dry_run, checkpoints=rows, freed_bytes=freed)


def _row(verdict: Verdict, spared: str | None) -> PrunedRow:
    manifest = verdict.manifest
    why = [*verdict.reasons, *([spared] if spared else [])]
    return PrunedRow(
        checkpoint=manifest.identity,
        slot=manifest.slot,
        kind=manifest.kind.value,
        step=manifest.step,
        size_bytes=manifest.size_bytes,
        keep=bool(why),
        why=why or ["no rule keeps it and nothing rests on it"],
    )
