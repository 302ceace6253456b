"""The engine as a child process: started with one end of a socket pair, spoken to in wire records."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from homefire.wire.engine import (
    Arrays,
    Done,
    Failure,
    Reply,
    Request,
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

    async def wait(self) -> int:
        """Blocks until the engine ends; its exit status."""
        ...

    async def shut_down(self) -> None:
        """It finishes and exits."""
        ...

    async def kill(self) -> int:
        """At once, and harmless when it has ended; its exit status."""
        ...


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
        self._reader = reader
        self._writer = writer

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
        try:
            self._writer.write(encode_request(request, arrays))
            await self._writer.drain()
            prefix = await self._reader.readexactly(PREFIX_BYTES)
            rest = await self._reader.readexactly(frame_rest(prefix))
        except (asyncio.IncompleteReadError, OSError) as exc:
            raise EngineDied(f"the engine died during {type(request).__name__}") from exc
        reply, answered = decode_reply(prefix + rest)
        if isinstance(reply, Failure):
            raise reply.error.exception()
        return reply, answered

    async def wait(self) -> int:
        return await self._process.wait()

    async def shut_down(self) -> None:
        await ask(self, Shutdown(), Done)
        await self.end()

    async def end(self) -> int:
        """Closes the socket, at which an engine exits; kills it if it does not. Its exit status."""
        self._writer.close()
        try:
            async with asyncio.timeout(_EXIT_TIMEOUT_S):
                return await self._process.wait()
        except TimeoutError:
            self._process.kill()
            return await self._process.wait()

    async def kill(self) -> int:
        self._writer.close()
        if self._process.returncode is None:
            self._process.kill()
        return await self._process.wait()


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
