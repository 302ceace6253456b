"""Passes are decoded, checked and packed while the engine computes the one before.

Only large ones: a small one takes less than the way to another thread. What they turn out to be, or what
is wrong with them, is kept until it is their turn, so errors come in the order of the requests.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from homefire.trainer.front import operations
from homefire.trainer.front.operations import Operation, OperationKind, RunPass
from homefire.trainer.front.sessions import Request
from homefire.trainer.front.validation import Batch, Limits, check_batch
from homefire.wire.errors import HomefireError

MAX_AHEAD_BYTES = 64 << 20
"""As the journal keeps them. Decoded and packed they are several times as large."""
_WORTH_IT_ABOVE = 32_768
"""The same bytes."""
_PASSES = (OperationKind.FORWARD, OperationKind.FORWARD_BACKWARD)


@dataclass(frozen=True)
class Prepared:
    operation: Operation
    batch: Batch | HomefireError | None = None
    """None: not a pass."""


class ReadAhead:
    """Owned by the front's event loop; threads do the work."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._tasks: dict[str, asyncio.Task[Prepared]] = {}

    def begin(self, coming: Sequence[Request]) -> None:
        """Prepares these, in this order and within bounds; forgets all others."""
        wanted = list(_within_bounds(coming))
        for gone in self._tasks.keys() - {request.request_id for request in wanted}:
            self._tasks.pop(gone)
        for request in wanted:
            if request.request_id not in self._tasks:
                work = asyncio.to_thread(prepare, request.operation, self._limits)
                self._tasks[request.request_id] = asyncio.create_task(work)

    def close(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        self._tasks = {}

    async def operation(self, request: Request) -> Operation:
        task = self._tasks.get(request.request_id)
        if task is None:
            return await operations.decode_off_loop(request.operation)
        return (await task).operation

    async def batch(self, request: Request, operation: RunPass) -> Batch:
        """Raises the first thing that is wrong with it."""
        task = self._tasks.get(request.request_id)
        if task is None:
            return await self._checked(request, operation)
        found = (await task).batch
        if isinstance(found, HomefireError):
            raise found
        return found or await self._checked(request, operation)

    async def _checked(self, request: Request, operation: RunPass) -> Batch:
        if len(request.operation) > _WORTH_IT_ABOVE:
            return await asyncio.to_thread(check_batch, operation.body, self._limits)
        return check_batch(operation.body, self._limits)


def prepare(packed: bytes, limits: Limits) -> Prepared:
    """Takes milliseconds per MB."""
    operation = operations.decode(packed)
    if not isinstance(operation, RunPass):
        return Prepared(operation)
    try:
        return Prepared(operation, check_batch(operation.body, limits))
    except HomefireError as error:
        return Prepared(operation, error)


def _within_bounds(coming: Sequence[Request]) -> list[Request]:
    found: list[Request] = []
    size_bytes = 0
    for request in coming:
        is_large = len(request.operation) > _WORTH_IT_ABOVE
        if is_large and request.kind in _PASSES:
            size_bytes += len(request.operation)
            if size_bytes > MAX_AHEAD_BYTES:
                break
            found.append(request)
    return found
