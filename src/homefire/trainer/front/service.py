"""The trainer front, put together: journal, ledger, admission, and the worker with its engine."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

from homefire.checkpoints import CheckpointStore, open_store
from homefire.foundation.clock import Clock, SystemClock
from homefire.foundation.disk import SYSTEM, Disk
from homefire.foundation.events import EventLog
from homefire.trainer.front.admission import Admission
from homefire.trainer.front.engine_process import Engine
from homefire.trainer.front.engine_ranks import start_engine
from homefire.trainer.front.futures import Futures
from homefire.trainer.front.graph_board import GraphBoard
from homefire.trainer.front.job_budget import JobBudget
from homefire.trainer.front.journal import Journal, read_journal
from homefire.trainer.front.live_model import LiveModel, open_model
from homefire.trainer.front.records import Reopened
from homefire.trainer.front.recovery import (
    Recovery,
    RedoSave,
    journal_directory,
    recovery_directory,
)
from homefire.trainer.front.recovery_points import RecoveryPoints
from homefire.trainer.front.sessions import Ledger
from homefire.trainer.front.slot_policy import slot_policy
from homefire.trainer.front.status import StatusBoard
from homefire.trainer.front.trimming import Trimming
from homefire.trainer.front.turns import Turns
from homefire.trainer.front.worker import Worker
from homefire.wire.specs import TrainerSpec


class Front:
    """One trainer job. `start`, then requests by way of `admission`, then `stop`."""

    def __init__(
        self,
        spec: TrainerSpec,
        clock: Clock | None = None,
        start_engine: Callable[[], Awaitable[Engine]] | None = None,
        disk: Disk = SYSTEM,
    ) -> None:
        """`start_engine` starts another kind of engine than the spec's process; journal and recovery
        points are kept on `disk`."""
        self.spec = spec
        self.clock = clock or SystemClock()
        self._start_engine = start_engine or self._start_process
        self.closing = asyncio.Event()
        """Set when nothing more will happen: long polls answer at once."""
        self.store: CheckpointStore = open_store(spec.store_root, self.clock)
        self.futures = Futures(self.clock)
        self.ledger = Ledger(self.futures)
        self.policy = slot_policy(spec, self.ledger)
        self._disk = disk
        self.journal = Journal(journal_directory(spec), self.ledger.apply, disk)
        self.events = EventLog(Path(spec.job_dir) / "events.jsonl", self.clock)
        self._graphs = GraphBoard(self.clock, limit_s=spec.held_graph_limit_s)
        self.status = StatusBoard(self.ledger, self._graphs, nonce=spec.nonce)
        trimming = Trimming(
            spec,
            self.ledger,
            self.futures,
            self.journal,
            recovery_directory(spec),
            self.status.report,
            disk,
        )
        self._points = RecoveryPoints(
            spec, self.clock, self.ledger, self.journal, self.events, trimming, disk
        )
        self._budget = JobBudget(spec)
        self.worker = self._make_worker()
        self.admission = Admission(
            spec,
            self.clock,
            self.ledger,
            self.policy,
            self.futures,
            self.journal,
            self.worker.wake,
            self._budget,
        )

    async def start(self) -> None:
        """Returns when requests can be accepted; the engine comes up behind. Raises DigestMismatch
        for a damaged journal."""
        await asyncio.to_thread(self._read_journal)
        await self.journal.append(Reopened(os.getpid(), self.clock.now()))
        self.events.append("started", pid=os.getpid(), num_waiting=len(self.ledger.requests))
        await self._points.delete_leftovers()
        self.admission.gaps.watch_all()
        self.worker.start()

    async def stop(self) -> None:
        """The running operation finishes, a recovery point is taken, the engine ends."""
        await self.worker.stop()
        self.closing.set()
        self.status.progress("stopped")

    async def close(self) -> None:
        """After the last request."""
        if not self.closing.is_set():
            await self.stop()
        self.admission.gaps.close()
        await self.journal.close()
        self.events.close()

    def _read_journal(self) -> None:
        self.journal.open()
        for segment, record in read_journal(self.journal.directory, self._disk):
            self.ledger.apply(record, segment)

    def _make_worker(self) -> Worker:
        return Worker(
            clock=self.clock,
            ledger=self.ledger,
            futures=self.futures,
            journal=self.journal,
            events=self.events,
            status=self.status,
            points=self._points,
            make_recovery=self._make_recovery,
            start_engine=self._start_engine,
            open_model=self._open_model,
            turns=Turns(self.ledger, pooled=self.spec.pooled),
            pack_tokens=lambda: self._budget.micro_batch_tokens,
        )

    def _make_recovery(self, redo_save: RedoSave) -> Recovery:
        return Recovery(self.spec, self.ledger, self.status.replaying, redo_save, self._disk)

    async def _start_process(self) -> Engine:
        return await start_engine(self.spec)

    async def _open_model(self, engine: Engine) -> LiveModel:
        model = await open_model(engine, self.spec, self.store, self.policy, self._graphs)
        await asyncio.to_thread(self._budget.note, model.opened.pass_budget)
        return model
