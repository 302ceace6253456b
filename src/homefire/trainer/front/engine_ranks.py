"""An engine of several processes, which live and die together."""

from __future__ import annotations

import asyncio
import secrets
import socket
from pathlib import Path

from homefire.trainer.front.engine_process import (
    Engine,
    EngineDied,
    EngineProcess,
    ask,
    start_rank,
)
from homefire.wire.engine import Arrays, Done, Reply, Request, SaveReply, SaveRequest, Shutdown
from homefire.wire.specs import EngineKind, TrainerSpec

_RENDEZVOUS = "ranks-"


async def start_engine(spec: TrainerSpec) -> Engine:
    log = Path(spec.job_dir) / "engine.log"
    if spec.ranks == 1 or spec.engine is EngineKind.FAKE:
        return await EngineProcess.start(spec.engine, threads=spec.threads, log=log)
    return await EngineRanks.start(spec, log=log)


class EngineRanks:
    """Implements `Engine`: rank 0, which is spoken to, and the ranks that follow it.

    When one ends, whatever the reason, the others are killed: they would wait for it, and the front
    replays on new ones.
    """

    def __init__(self, first: EngineProcess, others: list[asyncio.subprocess.Process]) -> None:
        self._first = first
        self._others = others
        self._ended: str | None = None
        self._watch = asyncio.create_task(self._end_together())

    @classmethod
    async def start(cls, spec: TrainerSpec, *, log: Path) -> EngineRanks:
        """The ranks meet at a new file in the job's folder."""
        common = [
            *("--ranks", str(spec.ranks), "--rank-timeout", str(spec.rank_timeout_s)),
            *("--rendezvous", str(_meeting_place(Path(spec.job_dir)))),
        ]
        pairs = [socket.socketpair() for _ in range(1, spec.ranks)]
        others: list[asyncio.subprocess.Process] = []
        try:
            for rank, (_, theirs) in enumerate(pairs, start=1):
                arguments = [*common, "--rank", str(rank)]
                others.append(
                    await start_rank(
                        spec.engine, theirs, threads=spec.threads, log=log, arguments=arguments
                    )
                )
            links = [ours for ours, _ in pairs]
            descriptors = ",".join(str(link.fileno()) for link in links)
            first = await EngineProcess.start(
                spec.engine,
                threads=spec.threads,
                log=log,
                arguments=[*common, "--links", descriptors],
                links=links,
            )
        except BaseException:
            for process in others:
                await _killed(process)
            raise
        finally:
            for pair in pairs:
                for end in pair:
                    end.close()
        return cls(first, others)

    @property
    def pid(self) -> int:
        return self._first.pid

    async def call(self, request: Request, arrays: Arrays | None = None) -> tuple[Reply, Arrays]:
        try:
            return await self._first.call(request, arrays)
        except EngineDied as exc:
            await self.wait()
            raise EngineDied(f"{self._ended} during {type(request).__name__}") from exc

    async def begin(self, request: SaveRequest) -> asyncio.Future[SaveReply]:
        try:
            return await self._first.begin(request)
        except EngineDied as exc:
            await self.wait()
            raise EngineDied(f"{self._ended} during {type(request).__name__}") from exc

    async def wait(self) -> int:
        await asyncio.shield(self._watch)
        return await self._first.wait()

    async def shut_down(self) -> None:
        await ask(self, Shutdown(), Done)
        await self._first.end()
        await self.wait()

    async def kill(self) -> int:
        await self._first.kill()
        return await self.wait()

    async def _end_together(self) -> None:
        """Returns when no rank is left."""
        waits = [self._first.wait(), *(process.wait() for process in self._others)]
        tasks = [asyncio.create_task(wait) for wait in waits]
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        rank = next(rank for rank, task in enumerate(tasks) if task in done)
        self._ended = f"rank {rank} ended with status {tasks[rank].result()}"
        await self._first.kill()
        for process in self._others:
            await _killed(process)
        await asyncio.gather(*tasks)


def _meeting_place(folder: Path) -> Path:
    """A file that is not there yet; those of earlier starts go."""
    for leftover in folder.glob(f"{_RENDEZVOUS}*"):
        leftover.unlink()
    return folder / f"{_RENDEZVOUS}{secrets.token_hex(8)}"


async def _killed(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.kill()
    await process.wait()
