"""What the journal records. The state of a front is what its records, in order, make of it."""

from __future__ import annotations

import msgspec

from homefire.trainer.front.operations import OperationKind
from homefire.trainer.front.ordering import SequenceOrder
from homefire.wire.engine import ExecutionPlan, LoraSpec, SlotKind
from homefire.wire.errors import ErrorRecord
from homefire.wire.tinker import PassOutput


class SessionCreated(msgspec.Struct, frozen=True, tag="session"):
    session_id: str
    at: float


class Accepted(msgspec.Struct, frozen=True, kw_only=True, tag="accepted"):
    """A request was taken on; its `request_id` may be answered once this is on disk."""

    request_id: str
    model_id: str
    seq: int | None
    """None: runs at the end of what the model had accepted."""
    key: str = ""
    """A request without seq is known again by its idempotency key."""
    digest: str
    kind: OperationKind
    operation: bytes
    """Canonical encoding (`operations.encode`), packed."""
    plan: ExecutionPlan | None = None
    at: float


class GapExpired(msgspec.Struct, frozen=True, tag="gap"):
    """The model no longer waits for `missing`; what was held behind it fails."""

    model_id: str
    missing: int


class Completed(msgspec.Struct, frozen=True, kw_only=True, tag="completed"):
    """A request has its result; its effect on the weights is now part of history.

    Records of this kind are in the order of execution: replay follows them.
    """

    request_id: str
    position: int
    """1, 2, 3 … over all requests of the job."""
    result: bytes
    """Encoded `Result`."""
    ok: bool
    """False: the result is a `FailedResult`."""
    step: int
    """Optimizer steps of the model's slot after it."""
    discarded: bool = False
    """The accumulated gradient was thrown away on this occasion."""
    at: float


class Packed(msgspec.Struct, frozen=True, kw_only=True, tag="packed"):
    """Passes of several slots are about to run as one, cut as each was when it was accepted.

    Bits depend on what runs together, so replay does the same; and a pack that has no results where
    the journal ends may have been what ended it, so its requests run alone from then on.
    """

    request_ids: list[str]
    """In the order in which their rows are packed."""
    at: float


class PackCompleted(msgspec.Struct, frozen=True, kw_only=True, tag="pack_completed"):
    """All results of a pack: one record, since none of them can be done again without the others."""

    completed: list[Completed]
    """In the order of the pack; positions follow on one another."""


class SaveTaken(msgspec.Struct, frozen=True, kw_only=True, tag="save_taken"):
    """The bytes of a save are taken: what it saves is what history was here. Its result follows."""

    request_id: str
    position: int
    """Among those of `Completed`."""
    step: int
    """Optimizer steps of the model's slot."""
    at: float


class SaveEnded(msgspec.Struct, frozen=True, kw_only=True, tag="save_ended"):
    """A save that was taken is durable, or has failed. Replay does again those without this record."""

    request_id: str
    result: bytes
    """Encoded `Result`."""
    ok: bool
    at: float


class PointTaken(msgspec.Struct, frozen=True, kw_only=True, tag="point"):
    """A recovery point holds everything up to `position`."""

    name: str
    position: int
    floor: int
    """The oldest segment that replay from this point may need."""
    at: float


class KeptResult(msgspec.Struct, frozen=True, array_like=True):
    request_id: str
    result: bytes
    """Encoded `Result`."""
    at: float
    """When the request completed."""


class ResultsKept(msgspec.Struct, frozen=True, tag="kept"):
    """Results that may still be fetched, written again so that their segments can go."""

    results: list[KeptResult]


class Reopened(msgspec.Struct, frozen=True, tag="reopened"):
    pid: int
    at: float


class Seen(msgspec.Struct, frozen=True, array_like=True):
    """A request that a duplicate is recognised by."""

    request_id: str
    digest: str


class Hole(msgspec.Struct, frozen=True):
    """Why the accumulated gradient is not what the client thinks it is."""

    seq: int | None
    why: str


class Handle(msgspec.Struct, kw_only=True):
    """One model id: a session's hold on a slot."""

    model_id: str
    session_id: str
    slot: str
    kind: SlotKind
    lora: LoraSpec | None = None
    base_model: str = ""
    """As its client named it."""
    created_by: Seen
    order: SequenceOrder = msgspec.field(default_factory=SequenceOrder)
    recent: dict[int, Seen] = {}
    """By seq, until the result is forgotten."""
    keys: dict[str, Seen] = {}
    """The same for requests without a seq, by idempotency key."""
    hole: Hole | None = None
    fenced: list[str] = []
    """Model ids that this handle superseded."""
    superseded_by: str | None = None
    """The session that took the slot over."""
    unloaded: bool = False
    failure: str = ""
    """Why it could not be created, if it could not."""
    own_passes: bool = False
    """Its passes are never packed with those of other models."""
    ended_at: int | None = None
    """Position of the request that unloaded it, or failed to create it."""


class Snapshot(msgspec.Struct, frozen=True, kw_only=True, tag="snapshot"):
    """First record of a segment: the state so far, so that earlier segments can be deleted."""

    position: int
    steps: dict[str, int] = {}
    sessions: list[str]
    handles: list[Handle]
    num_accepted: int
    points: list[PointTaken]


Record = (
    SessionCreated
    | Accepted
    | GapExpired
    | Packed
    | Completed
    | PackCompleted
    | SaveTaken
    | SaveEnded
    | PointTaken
    | ResultsKept
    | Reopened
    | Snapshot
)


class PassResult(msgspec.Struct, frozen=True, tag="pass"):
    output: PassOutput


STEP_TIME = "step_time_s"
"""The metric of an optimizer step that is another each time."""

STATE_DIGEST = "state_digest"
"""In the result of a load: which bytes were loaded. Results of earlier versions lack it."""

Body = dict[str, str | int | float | bool | dict[str, float] | None]


class PlainResult(msgspec.Struct, frozen=True, tag="plain"):
    """A result that is JSON on every wire."""

    body: Body

    def is_repeated_by(self, again: Result) -> bool:
        """In all but how long an optimizer step took, and which state was loaded: that is checked apart."""
        return isinstance(again, PlainResult) and self._compared() == again._compared()

    def _compared(self) -> Body:
        body = {name: value for name, value in self.body.items() if name != STATE_DIGEST}
        metrics = body.get("metrics")
        if isinstance(metrics, dict):
            body["metrics"] = {n: value for n, value in metrics.items() if n != STEP_TIME}
        return body


class FailedResult(msgspec.Struct, frozen=True, tag="failed"):
    error: ErrorRecord


Result = PassResult | PlainResult | FailedResult

_results: msgspec.msgpack.Decoder[Result] = msgspec.msgpack.Decoder(Result)


def encode_result(result: Result) -> bytes:
    return msgspec.msgpack.encode(result)


def decode_result(data: bytes) -> Result:
    return _results.decode(data)
