"""A job's record: what its trainer wrote to its events, and what clients added. Pure but for reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from homefire.control.db.rows import ClientMetricsRow
from homefire.foundation.events import read_events
from homefire.foundation.home import Home
from homefire.wire.records import MetricsRow

EVENTS_FILE = "events.jsonl"
CLIENT_EVENT = "client"
_RECORDED = frozenset({"forward", "forward_backward", "optim_step"})

Event = Mapping[str, Any]


def job_events(home: Home, job_id: str) -> list[Event]:
    """All events of the job's trainer, oldest first."""
    return [event for _, event in read_events(home.job(job_id) / EVENTS_FILE)]


def replica_events(home: Home) -> list[tuple[str, Event]]:
    """Every replica's events, each with its deployment's id, oldest first."""
    found = [
        (path.parent.parent.name, event)
        for path in (home.root / "deployments").glob(f"*/*/{EVENTS_FILE}")
        for event in events_of(path)
    ]
    return sorted(found, key=lambda pair: time_of(pair[1]))


def events_of(path: Path) -> list[Event]:
    return [event for _, event in read_events(path)]


def metrics_rows(events: Iterable[Event], added: Iterable[ClientMetricsRow]) -> list[MetricsRow]:
    """The record, oldest first."""
    rows = [_trainer_row(event) for event in events if event.get("event") in _RECORDED]
    rows += [
        MetricsRow(at=row.at, step=row.step, event=CLIENT_EVENT, metrics=dict(row.metrics))
        for row in added
    ]
    return sorted(rows, key=lambda row: row.at)


def time_of(event: Event) -> float:
    return number(event.get("at")) or 0.0


def number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value)


def integer(value: object) -> int | None:
    found = number(value)
    return None if found is None else int(found)


def _trainer_row(event: Event) -> MetricsRow:
    metrics: Any = event.get("metrics")
    return MetricsRow(
        at=time_of(event),
        step=integer(event.get("step")) or 0,
        event=str(event["event"]),
        loss=number(event.get("loss")),
        tokens=integer(event.get("tokens")),
        ms=number(event.get("ms")),
        metrics=cast(dict[str, Any], metrics) if isinstance(metrics, dict) else {},
    )
