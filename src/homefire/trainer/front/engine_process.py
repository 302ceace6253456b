"""The engine as a child process: started with one end of a socket pair, spoken to in wire records."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Awaitable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import msgspec

from homefire.wire.engine import (
    Arrays,
    Done,
    Failure,
    Reply,
    Request,
    SaveBegun,
    SaveFinished,
    SaveReply,
    SaveRequest,
    Shutdown,
)
from homefire.wire.engine_frames import PREFIX_BYTES, decode_reply, encode_request, frame_rest
from homefire.wire.errors import InternalError
from homefire.wire.specs import EngineKind

_EXIT_TIMEOUT_S = 10.0
Answer = TypeVar("Answer")


class EngineDied(Exception):
    """The engine's process ended, or its socket closed, before it answered."""


class Engine(Protocol):
    """What the front needs of an engine. One request at a time."""

    @property
    def pid(self) -> int: ...

    async def call(self, request: Request, arrays: Arrays | None = None) -> tuple[Reply, Arrays]:
        """Raises what the engine reports, or EngineDied."""
        ...

    async def begin(self, request: SaveRequest) -> asyncio.Future[SaveReply]:
        """A save: its bytes are taken when this returns, and it is durable, or has failed, when the future
        is done. Futures are done in the order of their saves; EngineDied when the engine died first.
        """
        ...

    async def wait(self) -> int:
        """Blocks until the engine ends; its exit status."""
        ...

    async def shut_down(self) -> None:
        """It finishes and exits."""
        ...

    async def kill(self) -> int:
        """At once, and harmless when it has ended; its exit status."""
        ...


async def ended(save: Awaitable[SaveReply], kind: type[Answer]) -> Answer:
    """What a save that began became. Raises why it failed, or EngineDied."""
    reply = await save
    if isinstance(reply, Failure):
        raise reply.error.exception()
    return expect(reply, kind)


async def ask(engine: Engine, message: Request, kind: type[Answer]) -> Answer:
    """A request without arrays; its answer must be of this kind."""
    reply, _ = await engine.call(message)
    return expect(reply, kind)


def expect(reply: Reply, kind: type[Answer]) -> Answer:
    if not isinstance(reply, kind):
        raise InternalError(f"the engine answered {type(reply).__name__}, not {kind.__name__}")
    return reply


class EngineProcess:
    """The engine as a child process of ours."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._process = process
        self._writer = writer
        self._answer: asyncio.Future[tuple[Reply, Arrays]] | None = None
        """To the request that runs."""
        self._saves: dict[int, asyncio.Future[SaveReply]] = {}
        """By ticket."""
        self._has_ended = False
        self._listening = asyncio.create_task(self._listen(reader))

    @classmethod
    async def start(
        cls,
        kind: EngineKind,
        *,
        threads: int,
        log: Path,
        arguments: Sequence[str] = (),
        links: Sequence[socket.socket] = (),
    ) -> EngineProcess:
        """The child inherits its end of a socket pair, and `links`; what it prints is appended to
        `log`."""
        ours, theirs = socket.socketpair()
        with theirs:
            process = await start_rank(
                kind, theirs, threads=threads, log=log, arguments=arguments, links=links
            )
        reader, writer = await asyncio.open_connection(sock=ours)
        return cls(process, reader, writer)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def call(self, request: Request, arrays: Arrays | None = None) -> tuple[Reply, Arrays]:
        self._answer = asyncio.get_running_loop().create_future()
        try:
            if self._has_ended:
                raise EngineDied("it has ended")
            self._writer.write(encode_request(request, arrays))
            await self._writer.drain()
            reply, answered = await self._answer
        except (EngineDied, OSError) as exc:
            raise EngineDied(f"the engine died during {type(request).__name__}") from exc
        if isinstance(reply, Failure):
            raise reply.error.exception()
        return reply, answered

    async def begin(self, request: SaveRequest) -> asyncio.Future[SaveReply]:
        reply, _ = await self.call(request)
        if isinstance(reply, SaveBegun):
            return self._save(reply.ticket)
        return save_done(reply)

    async def wait(self) -> int:
        return await self._process.wait()

    async def shut_down(self) -> None:
        await ask(self, Shutdown(), Done)
        await self.end()

    async def end(self) -> int:
        """Closes the socket, at which an engine exits; kills it if it does not. Its exit status."""
        self._hang_up()
        try:
            async with asyncio.timeout(_EXIT_TIMEOUT_S):
                return await self._process.wait()
        except TimeoutError:
            self._process.kill()
            return await self._process.wait()

    async def kill(self) -> int:
        self._hang_up()
        if self._process.returncode is None:
            self._process.kill()
        return await self._process.wait()

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        """Until the engine ends: each reply to whom it is for."""
        try:
            while True:
                prefix = await reader.readexactly(PREFIX_BYTES)
                frame = prefix + await reader.readexactly(frame_rest(prefix))
                self._hear(*decode_reply(frame))
        except (asyncio.IncompleteReadError, OSError, ValueError, msgspec.DecodeError) as exc:
            self._end_all(exc)

    def _hear(self, reply: Reply, arrays: Arrays) -> None:
        if isinstance(reply, SaveFinished):
            _settle(self._save(reply.ticket), reply.reply)
        elif self._answer is not None:
            _settle(self._answer, (reply, arrays))

    def _save(self, ticket: int) -> asyncio.Future[SaveReply]:
        """Asked for twice, when the save has begun and when it ended, in either order."""
        found = self._saves.pop(ticket, None)
        if found is not None:
            return found
        self._saves[ticket] = asyncio.get_running_loop().create_future()
        return self._saves[ticket]

    def _hang_up(self) -> None:
        self._writer.close()
        self._listening.cancel()
        self._end_all(None)

    def _end_all(self, why: Exception | None) -> None:
        self._has_ended = True
        for waiting in (self._answer, *self._saves.values()):
            if waiting is not None and not waiting.done():
                waiting.set_exception(EngineDied(f"the engine's stream ended: {why}"))
                waiting.exception()  # whoever waits hears of it; nobody may be left


def save_done(reply: Reply) -> asyncio.Future[SaveReply]:
    """The future of a save that was written at once."""
    done: asyncio.Future[SaveReply] = asyncio.get_running_loop().create_future()
    if not isinstance(reply, SaveReply):
        raise InternalError(f"the engine answered a save with {type(reply).__name__}")
    done.set_result(reply)
    return done


def _settle(future: asyncio.Future[Answer], result: Answer) -> None:
    """Unless whoever waited was cancelled."""
    if not future.done():
        future.set_result(result)


async def start_rank(
    kind: EngineKind,
    end: socket.socket,
    *,
    threads: int,
    log: Path,
    arguments: Sequence[str] = (),
    links: Sequence[socket.socket] = (),
) -> asyncio.subprocess.Process:
    """One process of an engine, with its end of a socket."""
    with log.open("ab") as output:
        return await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "homefire.trainer.engine"),
            *("--fd", str(end.fileno()), "--kind", kind.value, *arguments),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=[inherited.fileno() for inherited in (end, *links)],
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
