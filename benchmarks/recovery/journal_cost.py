"""What the journal adds to an operation, and to a training step.

The gateway's proxy and a front over HTTP, with an engine that computes nothing, called in turn with and
without the journal: without, operations are neither packed nor framed nor written, and count at once.
The step that this is compared with is one of the 33 M model in this process, on one thread; its
optim_step is journaled like any small operation.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import models
from batches import SHAPES, make_batch
from bodies import JSON, json_body
from idle_engine import VOCABULARY
from report import Bar, Report, Row
from services import Stack
from trainer import InProcess, one_thread

from homefire.trainer.front import operations
from homefire.trainer.front.journal import Journal
from homefire.trainer.front.records import Record

_SMALL = [32] * 4
_TRAINING = SHAPES["8x128"]
Operation = Callable[[], None]


def measure(report: Report, root: Path, *, quick: bool) -> None:
    one_thread()
    repeats = 20 if quick else 100
    with Stack(root) as stack:
        small = _added_s(_pass(stack, _SMALL), repeats)
        large = _added_s(_pass(stack, _TRAINING), repeats)
    report.add(Row("-", "4x32", "forward_backward: added by the journal", small))
    report.add(Row("-", "8x128", "forward_backward: added by the journal", large))
    training_s = _training_step_s(root, rounds=2 if quick else 5)
    report.add(Row("small", "8x128", "forward_backward and optim_step, in process", training_s))
    share = (large + small) / training_s
    report.add(
        Bar("journal, share of a training step of 33 M parameters, %", 100 * share, at_most=3),
        Bar("journal, small operation, ms", 1000 * small, at_most=2),
    )


def _pass(stack: Stack, lengths: list[int]) -> Operation:
    def once() -> None:
        body = json_body(stack.model, stack.client.next_seq(), lengths, VOCABULARY)
        stack.client.result(stack.client.forward_backward(body, JSON), accept=JSON)

    return once


def _added_s(operation: Operation, repeats: int) -> float:
    """Median of the differences: a slow moment of the machine slows both of a pair."""
    operation()
    differences: list[float] = []
    for _ in range(repeats):
        with _no_journal():
            without = _timed(operation)
        differences.append(_timed(operation) - without)
    return statistics.median(differences)


def _timed(operation: Operation) -> float:
    started = time.perf_counter()
    operation()
    return time.perf_counter() - started


@contextlib.contextmanager
def _no_journal() -> Iterator[None]:
    async def append(self: Journal, record: Record) -> None:
        self._apply(record, self._segment)

    with (
        mock.patch.object(Journal, "append", append),
        mock.patch.object(operations, "pack", lambda encoded: encoded),
    ):
        yield


def _training_step_s(root: Path, *, rounds: int) -> float:
    model = models.make_small(root)
    trainer = InProcess(model, root)
    slot, batch = trainer.open_full(), make_batch(_TRAINING, model.vocab_size)

    def once() -> None:
        trainer.forward_backward(slot, batch)
        trainer.step(slot)

    once()
    return statistics.median(_timed(once) for _ in range(rounds))
