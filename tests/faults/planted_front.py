"""Bugs that are planted in a front, to show that the suites of real kills and lost replies find them."""

from __future__ import annotations

import asyncio
from typing import Any

from homefire.trainer.front.admission import Admission
from homefire.trainer.front.futures import Futures
from homefire.trainer.front.journal import Journal
from homefire.trainer.front.live_model import LiveModel
from homefire.trainer.front.operations import OperationKind
from homefire.trainer.front.recovery import Recovery


def answers_before_it_journals() -> None:
    commit = Journal._commit

    async def planted(self: Journal, batch: Any) -> None:
        apply = self._apply
        for entry in batch:
            apply(entry.record, self.segment)
            entry.durable.set_result(None)
        for _ in range(1000):
            await asyncio.sleep(0)
        self._apply = lambda record, segment: None
        await commit(self, batch)
        self._apply = apply

    Journal._commit = planted


def knows_no_duplicates() -> None:
    async def planted(self: Admission, model: str, key: Any, seen: Any, submission: Any) -> None:
        return None

    Admission._known = planted


def applies_steps_twice_in_a_replay() -> None:
    replay = Recovery._replay_success

    async def planted(self: Recovery, model: LiveModel, accepted: Any, operation: Any) -> Any:
        if accepted.kind is OperationKind.OPTIM_STEP:
            await replay(self, model, accepted, operation)
        return await replay(self, model, accepted, operation)

    Recovery._replay_success = planted


def forgets_gradients_in_a_replay() -> None:
    replay = Recovery._replay_success

    async def planted(self: Recovery, model: LiveModel, accepted: Any, operation: Any) -> Any:
        if accepted.kind is OperationKind.FORWARD_BACKWARD:
            return None
        return await replay(self, model, accepted, operation)

    Recovery._replay_success = planted


def runs_what_is_in_the_journal_again() -> None:
    """A result counts for nothing after a restart: what was applied is applied once more."""
    from homefire.trainer.front.records import Completed
    from homefire.trainer.front.service import Front, read_journal

    def planted(self: Front) -> None:
        self.journal.open()
        records = list(read_journal(self.journal.directory, self._disk))
        last = max((n for n, (_, r) in enumerate(records) if isinstance(r, Completed)), default=-1)
        for number, (segment, record) in enumerate(records):
            if number != last:
                self.ledger.apply(record, segment)

    Front._read_journal = planted


def forgets_what_it_has_answered() -> None:
    """A result is gone once it was read, though the reply may have been lost."""
    read = Futures.read

    def planted(self: Futures, request_id: str) -> Any:
        result = read(self, request_id)
        self._stored.pop(request_id, None)
        return result

    Futures.read = planted


NETWORK_BUGS = (knows_no_duplicates, forgets_what_it_has_answered)
BUGS = (
    answers_before_it_journals,
    knows_no_duplicates,
    applies_steps_twice_in_a_replay,
    forgets_gradients_in_a_replay,
    runs_what_is_in_the_journal_again,
)
