"""Results that clients have yet to fetch, and those that they may fetch again.

A result is held encoded, as the journal has it. Reading is repeatable: a connection may die after the
body was written. It is forgotten a while after it was read, or much later if nobody came.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass

from homefire.foundation.clock import Clock
from homefire.trainer.front.records import KeptResult, Result, decode_result

RETENTION_S = 900.0
"""How long a result that was read stays readable."""
UNREAD_RETENTION_S = 6 * 3600.0
MAX_RESULT_BYTES = 512 << 20
"""Above this, results that were read are forgotten early, oldest first."""
MAX_UNREAD_BYTES = 2 << 30
"""Above this, so are those that nobody came for."""


@dataclass
class _Stored:
    result: bytes
    at: float
    segment: int | None
    read: bool = False


class Futures:
    """Owned by one event loop."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._pending: dict[str, asyncio.Event] = {}
        self._stored: dict[str, _Stored] = {}
        self._size_bytes = 0

    def expect(self, request_id: str) -> None:
        self._pending[request_id] = asyncio.Event()

    def resolve(
        self, request_id: str, result: bytes, *, at: float, segment: int | None = None
    ) -> None:
        """Keeps the result and wakes everyone who waits for it.

        `segment` of the journal has it too, and must not be deleted before it is forgotten.
        """
        if at < self._clock.now() - UNREAD_RETENTION_S:
            self._pending.pop(request_id, None)
            return
        self._stored[request_id] = _Stored(result, at, segment)
        self._size_bytes += len(result)
        event = self._pending.pop(request_id, None)
        if event is not None:
            event.set()

    def move(self, kept: KeptResult, segment: int) -> None:
        """This segment of the journal has the result now; after a restart, this one alone."""
        stored = self._stored.get(kept.request_id)
        if stored is not None:
            stored.segment = segment
        else:
            self.resolve(kept.request_id, kept.result, at=kept.at, segment=segment)

    def results_below(self, segment: int) -> list[KeptResult]:
        """What may still be fetched and is in an older segment of the journal."""
        return [
            KeptResult(request_id, stored.result, stored.at)
            for request_id, stored in self._stored.items()
            if stored.segment is not None and stored.segment < segment
        ]

    def is_known(self, request_id: str) -> bool:
        return request_id in self._pending or request_id in self._stored

    def is_pending(self, request_id: str) -> bool:
        return request_id in self._pending

    def completion(self, request_id: str) -> asyncio.Event:
        """Set when the pending request has its result."""
        return self._pending[request_id]

    def read(self, request_id: str) -> Result | None:
        """None while there is no result, or no longer one."""
        stored = self._stored.get(request_id)
        if stored is None:
            return None
        stored.read = True
        return decode_result(stored.result)

    def forget_old(self) -> list[str]:
        """Drops what is past its retention; returns the requests that are forgotten."""
        gone = list(self._expired())
        for request_id in gone:
            self._size_bytes -= len(self._stored.pop(request_id).result)
        return gone

    def oldest_segment(self) -> int | None:
        """The oldest segment of the journal with a result that may still be read."""
        return min(
            (s.segment for s in self._stored.values() if s.segment is not None), default=None
        )

    def _expired(self) -> Iterator[str]:
        now, size_bytes = self._clock.now(), self._size_bytes
        for request_id, stored in self._stored.items():
            limit = RETENTION_S if stored.read else UNREAD_RETENTION_S
            cap = MAX_RESULT_BYTES if stored.read else MAX_UNREAD_BYTES
            if now - stored.at > limit or size_bytes > cap:
                size_bytes -= len(stored.result)
                yield request_id
