"""Judges a run from outside: what went over the wire, beside the bytes of the journal.

Nothing of homefire is used but the journal's documented format, so that a mistake there is no excuse here.
"""

from __future__ import annotations

import struct
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from faults.chaos_proxy import Exchange

_FRAME = struct.Struct("<4sII")
_HEADER_BYTES = 8


def journal_records(job_dir: Path) -> list[dict[str, Any]]:
    """All records, as plain maps; the journal must have been kept whole."""
    return [
        record
        for segment in sorted((job_dir / "journal").glob("*.log"))
        for record in _records(segment.read_bytes())
    ]


def _records(data: bytes) -> Iterator[dict[str, Any]]:
    offset = _HEADER_BYTES
    while offset + _FRAME.size <= len(data):
        magic, size, crc = _FRAME.unpack_from(data, offset)
        payload = data[offset + _FRAME.size : offset + _FRAME.size + size]
        if magic != b"HFRM" or len(payload) < size or zlib.crc32(payload) != crc:
            return
        yield from msgspec.msgpack.decode(payload)
        offset += _FRAME.size + size


def objections(job_dir: Path, exchanges: Sequence[Exchange]) -> list[str]:
    """Every acknowledged operation once, in order, with the result that was reported; or what is wrong."""
    records = journal_records(job_dir)
    accepted = [record for record in records if record["type"] == "accepted"]
    completed = [each for record in records for each in _completions(record)]
    return [
        *_acknowledgements(exchanges, accepted),
        *_applications(accepted, completed),
        *_saves(records),
        *_order(accepted, completed),
        *_reports(exchanges),
        *_steps(exchanges, accepted, completed),
    ]


def _completions(record: dict[str, Any]) -> list[dict[str, Any]]:
    if record["type"] == "pack_completed":
        return record["completed"]
    return [record] if record["type"] in ("completed", "save_taken") else []


def _acknowledgements(
    exchanges: Sequence[Exchange], accepted: Sequence[dict[str, Any]]
) -> Iterator[str]:
    known = Counter(record["request_id"] for record in accepted)
    by_key: dict[Any, set[str]] = defaultdict(set)
    for exchange in exchanges:
        request_id = exchange.request_id
        if request_id is None or exchange.key is None:
            continue
        by_key[exchange.key].add(request_id)
        if known[request_id] != 1:
            yield f"{exchange.key} was acknowledged as {request_id}, accepted {known[request_id]} times"
    for key, request_ids in by_key.items():
        if len(request_ids) > 1:
            yield f"{key} was acknowledged as {sorted(request_ids)}"


def _applications(
    accepted: Sequence[dict[str, Any]], completed: Sequence[dict[str, Any]]
) -> Iterator[str]:
    times = Counter(record["request_id"] for record in completed)
    for record in accepted:
        if times[record["request_id"]] != 1:
            yield f"{record['request_id']} was completed {times[record['request_id']]} times"
    positions = [record["position"] for record in completed]
    if positions != list(range(1, len(positions) + 1)):
        yield f"positions are {positions}"


def _saves(records: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What was taken in its place is written beside training, and ends once."""
    ended = Counter(r["request_id"] for r in records if r["type"] == "save_ended")
    for record in records:
        if record["type"] == "save_taken" and ended[record["request_id"]] != 1:
            yield f"save {record['request_id']} ended {ended[record['request_id']]} times"


def _order(
    accepted: Sequence[dict[str, Any]], completed: Sequence[dict[str, Any]]
) -> Iterator[str]:
    seqs = {record["request_id"]: (record["model_id"], record["seq"]) for record in accepted}
    by_model: dict[str, list[int]] = defaultdict(list)
    for record in completed:
        model, seq = seqs.get(record["request_id"], ("", None))
        if seq is not None:
            by_model[model].append(seq)
    for model, order in by_model.items():
        if order != sorted(set(order)):
            yield f"{model} ran {order}"


def _reports(exchanges: Sequence[Exchange]) -> Iterator[str]:
    """However often a result is asked for, it is the same."""
    results: dict[tuple[bytes, str], set[bytes]] = defaultdict(set)
    for exchange in exchanges:
        if exchange.name == "retrieve_future" and exchange.status == 200:
            results[exchange.body, exchange.accept].add(exchange.answer)
    for (body, _), answers in results.items():
        if len(answers) > 1:
            yield f"{body!r} had {len(answers)} results"


def _steps(
    exchanges: Sequence[Exchange],
    accepted: Sequence[dict[str, Any]],
    completed: Sequence[dict[str, Any]],
) -> Iterator[str]:
    """An optimizer step reports the number that it has in the order of execution."""
    kinds = {record["request_id"]: record["kind"] for record in accepted}
    steps = [r for r in completed if kinds.get(r["request_id"]) == "optim_step" and r["ok"]]
    numbers = {record["request_id"]: n for n, record in enumerate(steps, start=1)}
    for exchange in exchanges:
        if exchange.name != "retrieve_future" or exchange.status != 200:
            continue
        request_id = msgspec.json.decode(exchange.body)["request_id"]
        if request_id not in numbers or "proto" in exchange.accept:
            continue
        reported = msgspec.json.decode(exchange.answer).get("step", numbers[request_id])
        if reported != numbers[request_id]:
            yield f"{request_id} is step {numbers[request_id]} and was reported as {reported}"
