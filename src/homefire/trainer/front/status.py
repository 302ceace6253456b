"""What the front says about itself, at /internal/status and to clients that wait."""

from __future__ import annotations

import msgspec

from homefire.foundation.versioned import Versioned
from homefire.trainer.front.graph_board import GraphBoard
from homefire.trainer.front.sessions import Ledger
from homefire.wire.errors import ErrorRecord
from homefire.wire.internal import ReplayProgress, TrainerState, TrainerStatus

_NOT_RUNNING = {
    TrainerState.STARTING: "the trainer's engine is loading the model",
    TrainerState.RECOVERING: "the trainer is recovering",
    TrainerState.STOPPING: "the trainer is stopping; it goes on where it was when it is started again",
}


class StatusBoard:
    """Waiters wake when the state changes, not at every step: counts are filled in when read."""

    def __init__(self, ledger: Ledger, graphs: GraphBoard, *, nonce: str) -> None:
        self._ledger = ledger
        self._graphs = graphs
        first = TrainerStatus(version=0, nonce=nonce, state=TrainerState.STARTING)
        self._versioned = Versioned(first)
        self._progress = ""
        self._replaying: ReplayProgress | None = None

    @property
    def state(self) -> TrainerState:
        return self._versioned.get().state

    @property
    def error(self) -> ErrorRecord | None:
        return self._versioned.get().error

    @property
    def pause_reason(self) -> str | None:
        """Why nothing runs just now; None while operations run."""
        reason = _NOT_RUNNING.get(self.state)
        return reason and (f"{reason}: {self._progress}" if self._progress else reason)

    def enter(self, state: TrainerState) -> None:
        self._progress, self._replaying = "", None
        self._change(state=state, detail="")

    def progress(self, text: str) -> None:
        """How far the present state has come; wakes nobody."""
        self._progress = text

    def replaying(self, done: int, total: int) -> None:
        """How many operations of a recovery were done again; wakes nobody."""
        self._replaying = ReplayProgress(done, total)
        self._progress = f"{done} of {total} operations replayed"

    def failed(self, error: ErrorRecord) -> None:
        self._change(state=TrainerState.FAILED, error=error, detail=error.message)

    def report(self, error: ErrorRecord) -> None:
        """Something went wrong that does not stop the trainer; it stays visible."""
        self._change(error=error)

    def count_restart(self) -> None:
        self._change(engine_restarts=self._versioned.get().engine_restarts + 1)

    def count_replayed(self, count: int) -> None:
        self._change(replayed=self._versioned.get().replayed + count)

    async def read(self, *, after: int | None, wait_s: float) -> TrainerStatus:
        version, status = await self._versioned.wait_beyond(after=after, timeout_s=wait_s)
        ledger = self._ledger
        return msgspec.structs.replace(
            status,
            version=version,
            step=ledger.step,
            num_accepted=ledger.num_accepted,
            num_applied=ledger.position,
            num_unsaved=ledger.num_unsaved,
            replaying=self._replaying,
            detail=status.detail or self._progress,
            graphs=self._graphs.read(),
        )

    def _change(self, **changes: object) -> None:
        self._versioned.set(msgspec.structs.replace(self._versioned.get(), **changes))
