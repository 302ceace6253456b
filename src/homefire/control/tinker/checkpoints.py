"""The checkpoints of the root plane's training runs, as their owner sees and manages them.

The manifests in the store are the truth; a run's row says in which job's part of the store it saves.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from homefire.checkpoints import CheckpointKey, CheckpointStore, check_stands_alone
from homefire.control.checkpoint_deletion import CheckpointDeletion
from homefire.control.db import tinker_tables
from homefire.control.db.database import Database
from homefire.control.db.rows import TinkerRunRow
from homefire.control.download_links import DownloadLinks, Grant
from homefire.control.tinker.checkpoint_paths import find_home
from homefire.control.tinker.runs import find_run, no_run
from homefire.foundation.clock import Clock
from homefire.wire.checkpoint_paths import CheckpointPath
from homefire.wire.errors import InvalidArgument, NotFound, UnknownSnapshot, WrongCheckpointKind
from homefire.wire.manifest import CheckpointFamily, Manifest
from homefire.wire.pooled import is_ephemeral

SHORTEST_TTL_S = 3600
LONGEST_TTL_S = 10 * 365 * 24 * 3600


@dataclass(frozen=True)
class Checkpoints:
    database: Database
    store: CheckpointStore
    deletion: CheckpointDeletion
    links: DownloadLinks
    clock: Clock

    async def of_run(self, account: str, run_id: str) -> list[Manifest]:
        """Newest first."""
        return await self.of_runs([await self._run(account, run_id)])

    async def of_account(self, account: str) -> list[Manifest]:
        """Of all its runs, newest first."""
        return await self.of_runs(
            await self.database.transact(lambda c: tinker_tables.runs(c, account))
        )

    async def of_runs(self, runs: list[TinkerRunRow]) -> list[Manifest]:
        """Newest first; what was saved at the same moment, in the order of the names.

        Without snapshots that sampling sessions alone know of, and without `tensors`.
        """

        def work() -> list[Manifest]:
            found = [
                m for run in runs for m in self.store.summaries(run.account, run.job, slot=run.id)
            ]
            named = [m for m in found if not is_ephemeral(m.identity)]
            return sorted(named, key=lambda m: (-m.created_at, m.slot, m.identity, m.family))

        return await asyncio.to_thread(work)

    async def get(self, account: str, path: CheckpointPath) -> Manifest:
        """NotFound, also for another account's."""
        run = await self._run(account, path.run)
        return await self._loadable(CheckpointKey(account, run.job, run.id, path.family, path.name))

    async def described(self, account: str, path: CheckpointPath) -> tuple[str, Manifest]:
        """The base model, as clients name it, and the manifest: of one of the account's own, of a
        dedicated job's too, or of one that its owner has published. NotFound."""
        run = await self.database.transact(lambda c: tinker_tables.run(c, path.run))
        if run is None:
            return await self._of_dedicated_job(account, path)
        if run.account == account:
            return run.base_model, await self.get(account, path)
        try:
            manifest = await self.get(run.account, path)
        except NotFound as exc:
            raise no_run(account, path.run) from exc
        if not manifest.public:
            raise no_run(account, path.run)
        return run.base_model, manifest

    async def _of_dedicated_job(self, account: str, path: CheckpointPath) -> tuple[str, Manifest]:
        try:
            home = await self.database.transact(
                lambda c: find_home(c, account, path, field="tinker_path")
            )
        except UnknownSnapshot as exc:
            raise no_run(account, path.run) from exc
        manifest = await self._loadable(home.key(path))
        return home.job.config.base_model.name, manifest

    async def delete(self, account: str, path: CheckpointPath) -> None:
        """FailedPrecondition while something rests on it."""
        await self.deletion.delete(await self.get(account, path))

    async def publish(self, account: str, path: CheckpointPath, *, public: bool) -> None:
        """Publishing what is public changes nothing, so that a repeated request succeeds."""
        key = CheckpointKey.of(await self.get(account, path))
        await asyncio.to_thread(lambda: self.store.publish(key, public=public))

    async def set_ttl(self, account: str, path: CheckpointPath, ttl_seconds: int | None) -> None:
        """From now on; None: it never expires."""
        key = CheckpointKey.of(await self.get(account, path))
        expires_at = self.expiry(ttl_seconds)
        await asyncio.to_thread(self.store.expire_at, key, expires_at)

    def expiry(self, ttl_seconds: int | None) -> float | None:
        """Unix time in seconds; InvalidArgument for what is out of range."""
        if ttl_seconds is None:
            return None
        if not SHORTEST_TTL_S <= ttl_seconds <= LONGEST_TTL_S:
            raise InvalidArgument(
                f"ttl_seconds is {ttl_seconds}",
                hint=f"use {SHORTEST_TTL_S} (one hour) to {LONGEST_TTL_S} (ten years), or null",
                field="ttl_seconds",
            )
        return self.clock.now() + ttl_seconds

    async def archive_link(self, account: str, path: CheckpointPath) -> tuple[str, float]:
        """A URL of all files as one tar, and when it ends, in Unix seconds."""
        manifest = await self.get(account, path)
        check_stands_alone(manifest)
        expires_at = self.links.expiry()
        grant = Grant(CheckpointKey.of(manifest), manifest.digest, None, expires_at)
        return self.links.sign(grant), expires_at

    async def file_links(self, account: str, path: CheckpointPath) -> tuple[dict[str, str], float]:
        """A URL of each file of external weights, and when all of them end, in Unix seconds."""
        if path.family is not CheckpointFamily.EXTERNAL:
            raise WrongCheckpointKind(
                f"{path} holds no external weights",
                hint="save_weights_external writes them; `tinker checkpoint download` does that",
                field="checkpoint_id",
            )
        manifest = await self.get(account, path)
        key, expires_at = CheckpointKey.of(manifest), self.links.expiry()
        urls = {
            name: self.links.sign(Grant(key, manifest.digest, name, expires_at))
            for name in manifest.files
        }
        return urls, expires_at

    async def _loadable(self, key: CheckpointKey) -> Manifest:
        try:
            return await asyncio.to_thread(self.store.loadable, key)
        except UnknownSnapshot as exc:
            raise NotFound(exc.message, hint=exc.hint, field="checkpoint_id") from exc

    async def _run(self, account: str, run_id: str) -> TinkerRunRow:
        return await self.database.transact(lambda c: find_run(c, account, run_id))
