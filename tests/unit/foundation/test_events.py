from __future__ import annotations

import errno
import os

from homefire.foundation.clock import ManualClock, rfc3339
from homefire.foundation.events import EventLog, read_events


def test_events_are_read_back_in_order_from_any_offset(tmp_path):
    clock = ManualClock(1000.0)
    log = EventLog(tmp_path / "events.jsonl", clock)
    log.append("optim_step", step=1)
    clock.advance(5)
    log.append("optim_step", step=2)
    log.close()
    events = list(read_events(tmp_path / "events.jsonl"))
    assert [(e["at"], e["step"]) for _, e in events] == [(1000.0, 1), (1005.0, 2)]
    (first_end, _), _ = events
    assert [e["step"] for _, e in read_events(tmp_path / "events.jsonl", first_end)] == [2]


def test_a_torn_last_line_is_left_for_later(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"event":"a"}\n{"event":"b"')
    assert [e["event"] for _, e in read_events(path)] == ["a"]


def test_a_damaged_line_does_not_hide_the_ones_behind_it(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"event":"a"}\nnot json\n{"event":"c"}\n')
    assert [e["event"] for _, e in read_events(path)] == ["a", "c"]


def test_a_missing_file_has_no_events(tmp_path):
    assert list(read_events(tmp_path / "none.jsonl")) == []


def test_times_are_written_as_protobuf_json_writes_them():
    assert rfc3339(0.5) == "1970-01-01T00:00:00.500000Z"


def test_a_full_disk_delays_events_and_tears_none(tmp_path, monkeypatch):
    """The disk takes half a line, then nothing, then everything again."""
    path = tmp_path / "events.jsonl"
    log = EventLog(path, ManualClock())
    write = os.write

    def full(descriptor: int, data: bytes) -> int:
        if not path.stat().st_size:
            return write(descriptor, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "no space left")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        log.append("first", number=1)
        log.append("second", number=2)
        assert list(read_events(path)) == []
    log.append("third", number=3)
    log.close()
    assert [event["number"] for _, event in read_events(path)] == [1, 2, 3]
