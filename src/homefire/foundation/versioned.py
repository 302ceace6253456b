"""A value that changes, with a version that long polls wait on."""

from __future__ import annotations

import asyncio
from typing import Generic, TypeVar

Value = TypeVar("Value")


class Versioned(Generic[Value]):
    """Owned by one event loop. `set` wakes every waiter; a version is never used twice.

    Example: `version, value = await status.wait_beyond(after=7, timeout_s=20)`.
    """

    def __init__(self, value: Value, *, version: int = 1) -> None:
        self._value = value
        self._version = version
        self._changed = asyncio.Event()

    @property
    def version(self) -> int:
        return self._version

    def get(self) -> Value:
        return self._value

    def set(self, value: Value) -> int:
        self._value = value
        self._version += 1
        self._changed.set()
        self._changed = asyncio.Event()
        return self._version

    async def wait_beyond(self, *, after: int | None, timeout_s: float) -> tuple[int, Value]:
        """Returns at once unless the version equals `after`; then at the next change or timeout."""
        try:
            async with asyncio.timeout(timeout_s):
                while after is not None and self._version == after:
                    await self._changed.wait()
        except TimeoutError:
            pass
        return self._version, self._value
