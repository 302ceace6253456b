"""Samples that clients wait for: each is a task, its result is kept for a while and may be read again.

They live in this process alone. A request that is not known here, because the replica was restarted or its
result is past its retention, is answered 410, at which every client samples again under a new number.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial

import msgspec

from homefire.foundation.clock import Clock
from homefire.wire.errors import (
    ErrorRecord,
    FailedPrecondition,
    HomefireError,
    InternalError,
    Overloaded,
    SequenceReused,
    Unavailable,
)
from homefire.wire.tinker_sampling import SampleOutput

log = logging.getLogger(__name__)
RETENTION_S = 600.0
"""How long a result that was read stays readable."""
UNREAD_RETENTION_S = 3600.0
MAX_RESULT_BYTES = 256 << 20
"""Above this the oldest results are forgotten early, those that were read before those that were not."""
Sampling = Callable[[], Awaitable[SampleOutput]]
Numbered = tuple[str, int]
"""Sampling session and seq_id: what a client repeats when it repeats a request."""


class StoredSample(msgspec.Struct, frozen=True, tag="sample"):
    output: SampleOutput


class StoredFailure(msgspec.Struct, frozen=True, tag="failure"):
    error: ErrorRecord


Outcome = StoredSample | StoredFailure
_CANCELLED = StoredFailure(ErrorRecord.of(FailedPrecondition("the request was cancelled")))
_decode = msgspec.msgpack.Decoder(Outcome).decode
_encode = msgspec.msgpack.Encoder().encode


@dataclass(eq=False)
class _Future:
    number: Numbered | None
    digest: str
    task: asyncio.Task[Outcome | None] | None = None
    done: asyncio.Event = field(default_factory=asyncio.Event)
    outcome: bytes | None = None
    ended_at: float = 0.0
    was_read: bool = False


class SampleFutures:
    """Owned by one event loop. `owner` is the deployment, whose name leads every request id."""

    def __init__(self, owner: str, clock: Clock) -> None:
        self._owner = owner
        self._clock = clock
        self._futures: dict[str, _Future] = {}
        """Oldest first."""
        self._by_number: dict[Numbered, str] = {}
        self._num_pending = 0
        self._size_bytes = 0
        self._looked_at = 0.0

    @property
    def num_pending(self) -> int:
        return self._num_pending

    def find(self, number: Numbered, digest: str) -> str | None:
        """The request that had this number; SequenceReused when that one asked for something else."""
        request_id = self._by_number.get(number)
        if request_id is not None and self._futures[request_id].digest != digest:
            raise SequenceReused(
                f"seq_id {number[1]} of sampling session {number[0]!r} asked for something else before",
                hint="number every request of a session once",
                field="seq_id",
            )
        return request_id

    def start(self, sample: Sampling, number: Numbered | None, digest: str) -> str:
        """Runs it in a task; returns its request id."""
        self._forget_old()
        request_id = f"{self._owner}.{secrets.token_hex(8)}"
        future = _Future(number, digest)
        self._futures[request_id] = future
        if number is not None:
            self._by_number[number] = request_id
        self._num_pending += 1
        future.task = asyncio.create_task(self._run(request_id, sample))
        future.task.add_done_callback(partial(self._end, request_id))
        return request_id

    def completion(self, request_id: str) -> asyncio.Event | None:
        """Set once the request has ended; None when it is not known here."""
        future = self._futures.get(request_id)
        return None if future is None else future.done

    def size_bytes(self, request_id: str) -> int:
        """About what the result will take on the wire; 0 while there is none."""
        future = self._futures.get(request_id)
        return len(future.outcome) if future is not None and future.outcome is not None else 0

    def read(self, request_id: str) -> Outcome | None:
        future = self._futures.get(request_id)
        if future is None or future.outcome is None:
            return None
        future.was_read = True
        return _decode(future.outcome)

    def cancel(self, request_id: str) -> None:
        """Stops its work. One that has ended, or is not known, is fine."""
        future = self._futures.get(request_id)
        if future is not None and future.task is not None:
            future.task.cancel()

    async def stop(self) -> None:
        tasks = [future.task for future in self._futures.values() if future.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, request_id: str, sample: Sampling) -> Outcome | None:
        """None: it is to be forgotten, so that its client samples again."""
        try:
            return StoredSample(await sample())
        except (Overloaded, Unavailable):
            return None
        except HomefireError as error:
            return StoredFailure(ErrorRecord.of(error))
        except Exception as error:  # a worker: whoever polls is told
            log.error("request %s failed", request_id, exc_info=error)
            failure = InternalError(
                f"{type(error).__name__}: {error}", hint="see the replica's log"
            )
            return StoredFailure(ErrorRecord.of(failure))

    def _end(self, request_id: str, task: asyncio.Task[Outcome | None]) -> None:
        future = self._futures[request_id]
        outcome = _CANCELLED if task.cancelled() else task.result()
        future.task = None
        self._num_pending -= 1
        if outcome is None:
            self._forget(request_id)
        else:
            future.outcome, future.ended_at = _encode(outcome), self._clock.now()
            self._size_bytes += len(future.outcome)
        future.done.set()

    def _forget_old(self) -> None:
        """Looks through them at most once a second, unless they are too large."""
        now, is_full = self._clock.now(), self._size_bytes > MAX_RESULT_BYTES
        if now - self._looked_at < 1.0 and not is_full:
            return
        self._looked_at = now
        ended = [(i, f) for i, f in self._futures.items() if f.outcome is not None]
        for request_id, future in sorted(ended, key=lambda pair: not pair[1].was_read):
            limit = RETENTION_S if future.was_read else UNREAD_RETENTION_S
            if now - future.ended_at > limit or self._size_bytes > MAX_RESULT_BYTES:
                self._forget(request_id)

    def _forget(self, request_id: str) -> None:
        future = self._futures.pop(request_id)
        self._size_bytes -= len(future.outcome or b"")
        if future.number is not None:
            del self._by_number[future.number]
