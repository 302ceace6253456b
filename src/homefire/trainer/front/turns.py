"""Whose request runs next: requests of one slot in their order, and the slots of a pool in turns.

A dedicated job's queue is run as it stands. In a pool the slot that was served longest ago comes
first, so a tenant that queues a thousand requests holds up another's by one of them, not by all.
"""

from __future__ import annotations

from collections import Counter
from itertools import islice

from homefire.trainer.front.sessions import Ledger, Request

_LOOK_AHEAD = 64
"""Requests."""
_COMING_PER_SLOT = 2


class Turns:
    """Owned by the worker."""

    def __init__(self, ledger: Ledger, *, pooled: bool) -> None:
        self._ledger = ledger
        self._pooled = pooled
        self._num_turns = 0
        self._served: dict[str, int] = {}
        """By slot: its last turn."""

    def waiting(self) -> list[Request]:
        """The first request of each slot, in the order of turns; of a dedicated job the next one."""
        requests = self._ledger.requests
        if not self._pooled:
            return [requests[self._ledger.queue[0]]]
        firsts = self._first_of_each_slot()
        return sorted(firsts.values(), key=lambda r: self._served.get(self._slot(r), 0))

    def coming(self) -> list[Request]:
        """The next ones of each slot, in the order of the queue: with the one that runs, the one after."""
        counts: Counter[str] = Counter()
        found: list[Request] = []
        for request_id in islice(self._ledger.queue, _LOOK_AHEAD):
            request = self._ledger.requests[request_id]
            counts[self._slot(request)] += 1
            if counts[self._slot(request)] <= _COMING_PER_SLOT:
                found.append(request)
        return found

    def note(self, request: Request) -> None:
        """The request's slot has its turn now."""
        self._num_turns += 1
        self._served[self._slot(request)] = self._num_turns
        if len(self._served) > 2 * len(self._ledger.handles):
            live = {handle.slot for handle in self._ledger.handles.values()}
            self._served = {slot: turn for slot, turn in self._served.items() if slot in live}

    def _first_of_each_slot(self) -> dict[str, Request]:
        """In the order of the queue."""
        firsts: dict[str, Request] = {}
        num_models = sum(load.num_requests > 0 for load in self._ledger.loads.values())
        for request_id in self._ledger.queue:
            request = self._ledger.requests[request_id]
            firsts.setdefault(self._slot(request), request)
            if len(firsts) == num_models:
                break
        return firsts

    def _slot(self, request: Request) -> str:
        return self._ledger.handles[request.model_id].slot
