"""An engine that computes nothing, behind the real socket, frames and loop: what is left is overhead."""

from __future__ import annotations

import asyncio
import socket
import threading
import time

import numpy as np

from homefire.trainer.engine.saves import PreparedSave, already_own
from homefire.trainer.engine.serve import serve
from homefire.trainer.front.engine_process import EngineProcess
from homefire.wire.engine import (
    Arrays,
    ForwardBackward,
    ModelOpened,
    OpenModel,
    OpenSlot,
    RecoverySaved,
    Rows,
    SaveRecovery,
    SlotOpened,
)

VOCABULARY = 16384


class IdleEngine:
    """Implements what the benchmark asks of `TrainingEngine`."""

    def __init__(self) -> None:
        self.busy_s = 0.0
        """How long a pass pretends to take; no processor time."""
        self.idle_s: list[float] = []
        """Between the end of one pass and the beginning of the next."""
        self._ended_at = time.perf_counter()

    def open_model(self, request: OpenModel) -> ModelOpened:
        return ModelOpened(
            architecture="idle",
            vocab_size=VOCABULARY,
            max_context_length=2048,
            num_parameters=0,
            pid=0,
        )

    def open_slot(self, request: OpenSlot) -> SlotOpened:
        return SlotOpened(slot=request.slot, kind=request.kind, num_trainable=0, step=0)

    def forward_backward(self, request: ForwardBackward, arrays: Arrays) -> tuple[Rows, Arrays]:
        self.idle_s.append(time.perf_counter() - self._ended_at)
        time.sleep(self.busy_s)
        logprobs = np.full(arrays["target_tokens"].shape, -1.234567, np.float32)
        self._ended_at = time.perf_counter()
        return Rows(metrics={"loss:sum": 0.0}), {"logprobs": logprobs}

    def prepare_save(self, request: SaveRecovery) -> PreparedSave[RecoverySaved]:
        return already_own(0, lambda: RecoverySaved(size_bytes=0, slots=[]))

    def free_expired(self) -> float | None:
        return None


async def start(engine: IdleEngine) -> EngineProcess:
    """Serves it in a thread, at the other end of a socket pair as an engine's process has it."""
    ours, theirs = socket.socketpair()
    thread = _Thread(theirs, engine)
    thread.start()
    reader, writer = await asyncio.open_connection(sock=ours)
    return EngineProcess(thread, reader, writer)  # pyright: ignore[reportArgumentType]


class _Thread(threading.Thread):
    """Stands in for the process that it would be."""

    pid = 0
    returncode: int | None = None

    def __init__(self, connection: socket.socket, engine: IdleEngine) -> None:
        super().__init__(daemon=True)
        self._connection = connection
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()

    def run(self) -> None:
        with self._connection:
            serve(self._connection, self._engine)  # pyright: ignore[reportArgumentType]
        self.returncode = 0
        self._loop.call_soon_threadsafe(self._ended.set)

    async def wait(self) -> int:
        await self._ended.wait()
        return 0

    def kill(self) -> None:
        """It ends with its socket."""
