"""What a forward_backward costs beside its computation: the whole path from the client's POST to its
result, through gateway, front, journal and socket to an engine that computes nothing, and back.

Processor time of every thread but the client's, so that a busy machine does not spoil it. Then the
phases one by one, and how long an engine stands idle between two passes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from bodies import JSON, PROTOBUF, Encode, json_body, protobuf_body
from idle_engine import VOCABULARY
from report import Bar, Report, Row
from services import Stack

from homefire.http.bodies import parse_json
from homefire.trainer.front import operations
from homefire.trainer.front.validation import Limits, check_batch
from homefire.wire import tinker, tinker_proto
from homefire.wire.engine import ExecutionPlan, ForwardBackward, Rows
from homefire.wire.engine_frames import (
    decode_reply,
    decode_request,
    encode_reply,
    encode_request,
)
from homefire.wire.tinker import PassOutput

_SMALL, _LARGE = [32] * 4, [512] * 50
_CASES: list[tuple[list[int], str, Encode, float]] = [
    (_SMALL, JSON, json_body, 3.0),
    (_LARGE, JSON, json_body, 12.0),
    (_LARGE, PROTOBUF, protobuf_body, 3.0),
]
_NAMES = {JSON: "JSON", PROTOBUF: "protobuf"}
_QUEUED = 6
_BUSY_S = 0.06
"""Of a pass, while the next ones arrive: longer than they take."""


def measure(report: Report, root: Path, *, repeats: int) -> None:
    with Stack(root) as stack:
        for lengths, kind, encode, at_most in _CASES:
            _measure_path(report, stack, lengths, kind, encode, at_most, repeats)
        for _, kind, encode, _ in _CASES[1:]:
            _measure_idle(report, stack, kind, encode, rounds=max(2, repeats // 10))
    for lengths, kind, encode, _ in _CASES[1:]:
        _measure_phases(report, lengths, kind, encode, repeats)


def _measure_path(
    report: Report,
    stack: Stack,
    lengths: list[int],
    kind: str,
    encode: Encode,
    at_most: float,
    repeats: int,
) -> None:
    cpu, wall, size = [], [], 0
    for _ in range(repeats + 2):
        body = encode(stack.model, stack.client.next_seq(), lengths, VOCABULARY)
        size = len(body)
        started = time.perf_counter(), time.process_time(), time.thread_time()
        stack.client.result(stack.client.forward_backward(body, kind), accept=kind)
        ended = time.perf_counter(), time.process_time(), time.thread_time()
        spent = [end - start for start, end in zip(started, ended, strict=True)]
        wall.append(spent[0])
        cpu.append(spent[1] - spent[2])
    what = f"overhead, {_NAMES[kind]} of {_size(size)}"
    shape = f"{len(lengths)} rows"
    median_s = statistics.median(cpu[2:])
    report.add(
        Row("-", shape, what, median_s),
        Row("-", shape, f"{what}, wall, with one fsync", statistics.median(wall[2:])),
        Bar(
            f"{what}, ms of processor time",
            1000 * median_s,
            at_most=at_most,
            limited_by="see the phases: reading numbers, compressing and hashing what is journaled",
        ),
    )


def _measure_idle(report: Report, stack: Stack, kind: str, encode: Encode, *, rounds: int) -> None:
    """One request at a time, and several on the way: the next is read and packed meanwhile."""
    engine, client = stack.engine, stack.client
    alone, queued = [], []
    for _ in range(rounds):
        bodies = [
            encode(stack.model, client.next_seq(), _LARGE, VOCABULARY) for _ in range(2 * _QUEUED)
        ]
        for body in bodies[:_QUEUED]:
            client.result(client.forward_backward(body, kind), accept=kind)
        alone += engine.idle_s[1 - _QUEUED :]
        engine.busy_s = _BUSY_S
        ids = [client.forward_backward(body, kind) for body in bodies[_QUEUED:]]
        for request_id in ids:
            client.result(request_id, accept=kind)
        engine.busy_s = 0.0
        queued += engine.idle_s[1 - _QUEUED :]
    what = f"engine idle between passes, {_NAMES[kind]}"
    shape = f"{len(_LARGE)} rows"
    report.add(
        Row("-", shape, f"{what}, one by one, wall", statistics.median(alone)),
        Row("-", shape, f"{what}, queued, wall", statistics.median(queued)),
    )


def _measure_phases(
    report: Report, lengths: list[int], kind: str, encode: Encode, repeats: int
) -> None:
    body = encode("model", 1, lengths, VOCABULARY)
    shape, name = f"{len(lengths)} rows", _NAMES[kind]

    def phase(what: str, call: Callable[[], object]) -> None:
        report.add(Row("-", shape, f"  {name}: {what}", _thread_s(call, repeats)))

    def decode() -> tinker.PassRequest:
        if kind == PROTOBUF:
            return tinker_proto.decode_forward_backward(body)
        return tinker.forward_backward_pass(parse_json(body, tinker.ForwardBackwardRequest))

    operation = operations.run_pass(decode().body)
    assert isinstance(operation, operations.RunPass)
    encoded = operations.encode(operation)
    batch = check_batch(operation.body, Limits(VOCABULARY, 2048))
    message = ForwardBackward(
        slot="policy",
        loss_fn=operation.body.loss_fn,
        loss_fn_config={},
        plan=ExecutionPlan(micro_batches=[], threads=1),
    )
    logprobs = np.full(batch.arrays["target_tokens"].shape, -1.234567, np.float32)
    output = PassOutput(metrics={"loss:sum": 0.0}, arrays=batch.unpack({"logprobs": logprobs}))
    reply = Rows(metrics={"loss:sum": 0.0})

    def frames() -> None:
        decode_request(encode_request(message, batch.arrays))
        decode_reply(encode_reply(reply, {"logprobs": logprobs}))

    phase("read the body", decode)
    phase("record and digest", lambda: operations.digest_of(operations.encode(operation)))
    phase("compress for the journal", lambda: operations.pack(encoded))
    phase("check and pack", lambda: check_batch(operation.body, Limits(VOCABULARY, 2048)))
    phase("frames to the engine and back", frames)
    write = tinker_proto.encode_output if kind == PROTOBUF else tinker.output_json
    phase("write the answer", lambda: write(output))


def _thread_s(call: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        started = time.thread_time()
        call()
        times.append(time.thread_time() - started)
    return statistics.median(times)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes > 100_000 else f"{num_bytes / 1e3:.0f} kB"
