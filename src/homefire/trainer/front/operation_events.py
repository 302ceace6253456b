"""What a completed operation leaves in events.jsonl."""

from __future__ import annotations

from homefire.foundation.events import EventLog
from homefire.trainer.front.operations import OperationKind
from homefire.trainer.front.outcome import Outcome
from homefire.trainer.front.sessions import Ledger, Request


class OperationEvents:
    def __init__(self, ledger: Ledger, events: EventLog) -> None:
        self._ledger = ledger
        self._events = events

    def tell(self, request: Request, outcome: Outcome, *, step: int, ms: float) -> None:
        common = {"model_id": request.model_id, "seq_id": request.seq, "step": step}
        if outcome.error is not None:
            error = outcome.error
            fields = {"kind": request.kind, "code": error.code, "message": error.message}
            self._events.append("request_failed", **common, **fields)
        elif outcome.event:
            self._events.append(outcome.event, **common, ms=round(ms, 2), **outcome.fields)
            if request.kind is OperationKind.CREATE_MODEL:
                self._tell_fencing(request, outcome)
            if "sampling_session_id" in outcome.fields:
                self._tell_sampling_session(request, outcome)

    def _tell_fencing(self, request: Request, outcome: Outcome) -> None:
        handle = self._ledger.handles[request.model_id]
        who = {"session_id": handle.session_id, "slot": handle.slot, "by": handle.model_id}
        for model_id in handle.fenced:
            self._events.append("superseded", model_id=model_id, **who)
        if outcome.fields.get("num_backward_calls"):
            counts = {k: outcome.fields[k] for k in ("num_backward_calls", "num_loss_tokens")}
            model_id = handle.fenced[-1] if handle.fenced else handle.model_id
            self._events.append("gradients_discarded", model_id=model_id, **who, **counts)

    def _tell_sampling_session(self, request: Request, outcome: Outcome) -> None:
        handle = self._ledger.handles[request.model_id]
        self._events.append(
            "sampling_session_created",
            sampling_session_id=outcome.fields["sampling_session_id"],
            identity=outcome.fields["identity"],
            model_id=handle.model_id,
            session_id=handle.session_id,
            base_model=handle.base_model,
        )
