"""What is written down about runs: metrics, evaluations, lineage."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import msgspec

from homefire.checkpoints import CheckpointKey, CheckpointStore
from homefire.control.checkpoint_deletion import CheckpointDeletion
from homefire.control.db import tables
from homefire.control.db.database import Database
from homefire.control.db.rows import ClientMetricsRow, EvaluationRow, JobRow
from homefire.control.job_records import job_events, metrics_rows, replica_events
from homefire.control.lineage import lineage_of
from homefire.control.lineage_graph import account_graph, answer
from homefire.control.presentation import evaluation_resource
from homefire.control.prompt_sets import keep_prompt_set, read_prompt_set
from homefire.foundation.clock import Clock
from homefire.foundation.home import Home
from homefire.wire.errors import FailedPrecondition, NotFound
from homefire.wire.ids import new_id
from homefire.wire.manifest import Manifest
from homefire.wire.records import (
    Evaluation,
    EvaluationEntry,
    Lineage,
    LineageQuestion,
    MetricsEntry,
    MetricsRow,
    PromptSet,
)


@dataclass(frozen=True)
class RunRecords:
    database: Database
    store: CheckpointStore
    home: Home
    clock: Clock
    deletion: CheckpointDeletion

    async def metrics(self, job: JobRow) -> list[MetricsRow]:
        """Oldest first."""
        added = await self.database.transact(lambda c: tables.client_metrics(c, job.id))
        events = await asyncio.to_thread(job_events, self.home, job.id)
        return metrics_rows(events, added)

    async def add_metrics(self, job: JobRow, entry: MetricsEntry) -> MetricsRow:
        row = ClientMetricsRow(
            job=job.id, at=self.clock.now(), step=entry.step, metrics=entry.metrics
        )
        await self.database.transact(lambda c: tables.insert_client_metrics(c, row))
        return metrics_rows([], [row])[0]

    async def evaluations(self, account: str, *, job_id: str | None = None) -> list[Evaluation]:
        """Oldest first; of one job when it is named."""
        rows = await self.database.transact(lambda c: tables.evaluations(c, account))
        return [evaluation_resource(row) for row in rows if job_id in (None, row.job)]

    async def evaluation(self, account: str, evaluation_id: str) -> Evaluation:
        """NotFound when the account has none of that id."""
        for found in await self.evaluations(account):
            if found.id == evaluation_id:
                return found
        raise NotFound(
            f"evaluation {evaluation_id!r} does not exist", hint="list the account's evaluations"
        )

    async def prompts(self, account: str, evaluation_id: str) -> PromptSet:
        """FailedPrecondition when the record came without its prompts, or they were lost."""
        found = await self.evaluation(account, evaluation_id)
        sha256 = found.prompt_tokens_sha256
        if not sha256:
            raise FailedPrecondition(
                f"evaluation {evaluation_id} was recorded without its prompts",
                hint="record it with `completions` (or promptTokens), which keeps them",
            )
        return await asyncio.to_thread(read_prompt_set, self.home, sha256)

    async def add_evaluation(self, account: str, entry: EvaluationEntry) -> Evaluation:
        sha256 = ""
        if entry.prompt_tokens:
            sha256 = await asyncio.to_thread(keep_prompt_set, self.home, entry.prompt_tokens)
        num_prompts = entry.num_prompts or len(entry.prompt_tokens)
        entry = msgspec.structs.replace(
            entry, prompt_tokens=[], prompt_tokens_sha256=sha256, num_prompts=num_prompts
        )
        row = EvaluationRow(
            id=new_id("evaluation"),
            account=account,
            job=entry.job.rpartition("/")[2],
            at=self.clock.now(),
            entry=msgspec.to_builtins(entry),
        )
        await self.database.transact(lambda c: tables.insert_evaluation(c, row))
        return evaluation_resource(row)

    async def checkpoints(self, job: JobRow) -> list[Manifest]:
        """Snapshots and states, oldest first, whatever became of the job."""
        return await asyncio.to_thread(self.store.list, job.account, job.id)

    async def delete_checkpoint(self, job: JobRow, name: str) -> None:
        """Refuses, naming it, while something rests on the checkpoint: a delta, a deployment, a job."""
        await self.deletion.delete(await self._checkpoint(job, name))

    async def pin_checkpoint(self, job: JobRow, name: str, *, pinned: bool) -> Manifest:
        """The manifest as it now is."""
        key = CheckpointKey.of(await self._checkpoint(job, name))
        return await asyncio.to_thread(lambda: self.store.pin(key, pinned=pinned))

    async def _checkpoint(self, job: JobRow, name: str) -> Manifest:
        manifests = await self.checkpoints(job)
        found = [m for m in manifests if m.identity == name]
        if not found:
            names = ", ".join(m.identity for m in manifests) or "none"
            raise NotFound(f"job {job.id!r} has no checkpoint {name!r}", hint=f"it has: {names}")
        if len(found) > 1:
            paths = ", ".join(f"{m.slot}/{m.family}/{name}" for m in found)
            raise FailedPrecondition(
                f"job {job.id!r} has {len(found)} checkpoints called {name!r}: {paths}",
                hint="name one by its path, with `tinker checkpoint …`",
            )
        return found[0]

    async def account_lineage(self, account: str, question: LineageQuestion) -> Lineage:
        """The part of the account's graph that the question is about; tombstones are in it."""
        jobs = [job for job in await self.database.transact(tables.jobs) if job.account == account]
        rows = await self.database.transact(tables.deployments)
        graph = account_graph(
            [await self.lineage(job) for job in jobs],
            [row for row in rows if row.account == account],
        )
        return answer(graph, question)

    async def lineage(self, job: JobRow) -> Lineage:
        evaluations = await self.evaluations(job.account)
        models = await self.database.transact(tables.models)
        checkpoints = await self.checkpoints(job)

        def build() -> Lineage:
            return lineage_of(
                job,
                events=job_events(self.home, job.id),
                checkpoints=checkpoints,
                replica_events=replica_events(self.home),
                evaluations=evaluations,
                models=[model for model in models if model.account == job.account],
            )

        return await asyncio.to_thread(build)
