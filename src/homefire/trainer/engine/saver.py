"""The thread of an engine that writes saves while its other thread trains."""

from __future__ import annotations

import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from homefire.foundation import memory
from homefire.trainer.engine.saves import PreparedSave, Write
from homefire.wire.engine import Failure, SaveBegun, SaveFinished, SaveReply
from homefire.wire.errors import EngineFailed, ErrorRecord, HomefireError

log = logging.getLogger(__name__)
_SHARE_OF_FREE_MEMORY = 4
"""Copies of all saves in flight take at most one part in so many of it."""


def copies_budget() -> int:
    """Bytes; 0, so that every save is written at once, where nothing says what is free."""
    free_bytes = memory.available_bytes()
    return 0 if free_bytes is None else free_bytes // _SHARE_OF_FREE_MEMORY


class Saver:
    """Writes saves one at a time, in the order of `begin`. `report` is called in the writing thread."""

    def __init__(
        self,
        report: Callable[[SaveFinished], object],
        budget_bytes: Callable[[], int] = copies_budget,
    ) -> None:
        self._report = report
        self._budget_bytes = budget_bytes
        self._tickets = itertools.count(1)
        self._waiting: deque[_Kept] = deque()
        self._num_unfinished = 0
        self._held_bytes = 0
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None

    def begin(self, save: PreparedSave[SaveReply]) -> SaveBegun | SaveReply:
        """Its copy is taken before this returns. Where that would not fit into the budget, it is written
        here, after those that began before it."""
        if not self._reserve(save.size_bytes):
            self.finish()
            return finished(save.write)
        kept = _Kept(next(self._tickets), save.size_bytes, save.keep())
        with self._changed:
            self._waiting.append(kept)
            self._num_unfinished += 1
            self._changed.notify_all()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="saver", daemon=True)
            self._thread.start()
        return SaveBegun(kept.ticket)

    def finish(self) -> None:
        """Blocks until everything that began is written and reported."""
        with self._changed:
            self._changed.wait_for(lambda: self._num_unfinished == 0)

    def close(self) -> None:
        """Nobody waits for saves any more. One that is being written ends with the process, and then
        leaves nothing that counts; the others never begin."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _reserve(self, size_bytes: int) -> bool:
        with self._changed:
            fits = self._held_bytes + size_bytes <= self._budget_bytes()
            self._held_bytes += size_bytes if fits else 0
            return fits

    def _run(self) -> None:
        while (kept := self._next()) is not None:
            ticket, size_bytes = kept.ticket, kept.size_bytes
            reply = finished(kept.write)
            del kept  # the copy itself, before its room is given away
            self._report(SaveFinished(ticket, reply))
            with self._changed:
                self._num_unfinished -= 1
                self._held_bytes -= size_bytes
                self._changed.notify_all()

    def _next(self) -> _Kept | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            return None if self._closed else self._waiting.popleft()


@dataclass(frozen=True)
class _Kept:
    ticket: int
    size_bytes: int
    write: Write[SaveReply]


def finished(write: Write[SaveReply]) -> SaveReply:
    """What became of a save. Never raises: a broken one must not end the engine."""
    try:
        return write()
    except HomefireError as exc:
        log.info("a save failed: %s", exc)
        return Failure(ErrorRecord.of(exc))
    except Exception as exc:
        log.exception("a save broke")
        return Failure(ErrorRecord.of(EngineFailed(f"a save broke: {type(exc).__name__}: {exc}")))
