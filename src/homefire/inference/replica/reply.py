"""One generation as the event loop sees it: what the engine said, waiting to be read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from homefire.inference.engine.protocol import Failed, Prefilled, Sampled, Started, Update
from homefire.wire.errors import HomefireError


class Reply:
    """A `Listener` owned by one event loop. A reader that lags finds several updates at once."""

    def __init__(self, num_sequences: int) -> None:
        self._num_open = num_sequences
        self._started: Started | None = None
        self._updates: list[Prefilled | Sampled] = []
        self._error: HomefireError | None = None
        self._changed = asyncio.Event()

    @property
    def is_done(self) -> bool:
        return self._num_open == 0 or self._error is not None

    def receive(self, update: Update) -> None:
        if isinstance(update, Started):
            self._started = update
        elif isinstance(update, Failed):
            self._error = update.error
        else:
            self._updates.append(update)
            if isinstance(update, Sampled) and update.finish is not None:
                self._num_open -= 1
        self._changed.set()

    def abandon(self, error: HomefireError) -> None:
        """Wakes the reader with an error of our own, e.g. because its client is gone."""
        self.receive(Failed(error))

    async def started(self) -> Started:
        """Waits for the admission, at which the weights are fixed."""
        while self._started is None:
            await self._wait()
        return self._started

    async def batches(self) -> AsyncIterator[list[Prefilled | Sampled]]:
        """All updates up to the end, as many at a time as there are."""
        while True:
            while not self._updates:
                if self._num_open == 0:
                    return
                await self._wait()
            updates, self._updates = self._updates, []
            yield updates

    async def _wait(self) -> None:
        if self._error is not None:
            raise self._error
        self._changed.clear()
        await self._changed.wait()
