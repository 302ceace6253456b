"""What became of one operation: its result, and what the record says about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from homefire.trainer.front.records import FailedResult, Result
from homefire.wire.errors import ErrorRecord, HomefireError

Fields = Mapping[str, str | int | float | bool | dict[str, float] | None]


@dataclass(frozen=True)
class Outcome:
    result: Result
    discarded: bool = False
    """The accumulated gradient was thrown away."""
    event: str = ""
    """What happened, for events.jsonl."""
    fields: Fields = field(default_factory=dict[str, "str | int | float"])

    @property
    def error(self) -> ErrorRecord | None:
        return self.result.error if isinstance(self.result, FailedResult) else None


def failed(error: HomefireError, *, discarded: bool = False) -> Outcome:
    return Outcome(FailedResult(ErrorRecord.of(error)), discarded=discarded)
